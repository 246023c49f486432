"""Decides what weights the loss of a step's tokens, once, before the step's first update.

R completions of the step, T tokens of one of them.

What the ratio r of the loss is taken to, where p is the policy that is updated, p0 the trainer's
before the step's first update, and b the one that sampled, by the sampler's own log-probabilities:

    one update            r = 1                              b = p0 = p
    several updates       r = p / p0                         b = p0
    stale                 r = p / b                          engine.staleness 1
    sampler_correction    r as in the first two lines, each token's loss times w = p0 / b, bounded

Prefix given, E_b[p / b · f] = E_p[f] for a token drawn from b. So the policy gradient, -r A, and
distillation, sg(r) k2, have the gradients that samples of p would give, but for clip and
kd_ratio_cap, which bound the weight of what p does more often than b. With w · p / p0 = p / b the
same holds, and the clip is around p0, where the step starts, not around the stale b: decoupled PPO
(arXiv:2110.00641, arXiv:2505.24298). Multiplying p / b by w would apply p0 / b twice, so
the code never does it. The distribution of prefixes remains that of b, as in PPO.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdrl_train.batch import Batch, CompletionCoefficients, Rollouts, TeacherReply, TopkScores
from kdrl_train.config import TrainConfig
from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.histogram import PERCENTILES
from kdrl_train.method.metrics import token_means
from kdrl_train.method.routing import routed_metrics, routed_weights
from kdrl_train.method.schedules import scheduled_coefs
from kdrl_train.model.packing import PackedBatch, pack
from kdrl_train.ranks import World
from kdrl_train.rollouts.teacher_prompts import as_teacher_reads, teacher_prompts
from kdrl_train.runfolder.log import Stages
from kdrl_train.runfolder.signals import Stopped
from kdrl_train.step.run import Run
from kdrl_train.step.samples import SampleRecorder
from kdrl_train.step.score import MISMATCH, RolloutScores, score_packs


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` has decided for a step."""

    coefficients: CompletionCoefficients
    """Token weights 1 where there is a reward: each update sets its own."""
    metrics: dict[str, float | None]
    """For the step's record; they take the place of those that the updates measure."""


def needs_scores(config: TrainConfig, staleness: int = 0) -> bool:
    """Whether a step needs the pass of score_packs before its first update."""
    method = config.method
    return (
        (config.optim.updates_per_rollout > 1 and not staleness)
        or method.sampler_correction != "none"
        or method.kd == "reward"
    )


def prepare(
    run: Run, batch: Batch, step: int, stages: Stages, recorder: SampleRecorder | None = None
) -> Prepared:
    """Decide the coefficients of a step; the models run only where needs_scores says so."""
    config, method, rewards_PG = run.config, run.config.method, batch.rewards
    routed = run.teachers.routed
    scheduled = scheduled_coefs(method, step, run.history, routed)
    number_R = torch.zeros(rewards_PG.numel(), dtype=torch.int64)
    if routed:
        number_R = run.teachers.numbers(batch.examples)
    number_P = number_R.view_as(rewards_PG)[:, 0]
    betas = scheduled.teachers or (scheduled.kd,)
    weights = routed_weights(method, betas, rewards_PG, batch.right, number_P, routed)
    kd_weight_R = weights.kd_weight
    rewarded_R = ~rewards_PG.isnan().flatten()
    coefficients = CompletionCoefficients(
        advantages=torch.zeros_like(kd_weight_R),
        kd_weight=kd_weight_R,
        token_weights=rewarded_R.float(),
        distil_eos=method.kd_eos == "keep",
        teacher_prompts=prompts_of_teachers(run, batch),
        teacher=number_R if run.teachers else None,
        kd_prefix=method.kd_prefix,
    )
    if run.teachers.remote:
        distilled_R = (kd_weight_R > 0) & rewarded_R
        with stages("teacher") if distilled_R.any() else nullcontext():
            replies = query_server(run, batch, coefficients, distilled_R)
            coefficients = with_replies(coefficients, method, replies)
    scores = RolloutScores()
    if needs_scores(config, batch.staleness):
        with stages("score"):
            scores = score(run, batch, coefficients, recorder)
    if method.kd == "reward":
        log_ratio_R = torch.zeros(len(kd_weight_R), dtype=torch.float64)
        for r, log_ratio in scores.teacher_log_ratio.items():
            log_ratio_R[r] = log_ratio
        rewards_PG = grpo.shaped_rewards(rewards_PG, kd_weight_R, log_ratio_R)
        kd_weight_R = torch.zeros_like(kd_weight_R)
    metrics = routed_metrics(method, weights, scheduled.policy, routed)
    metrics |= _measured(scores.sums, method, routed)
    factors = None
    if method.sampler_correction != "none":
        factors, correction_metrics = correction(scores.logprobs, batch.rollouts, method)
        metrics |= correction_metrics
    old: Mapping[int, Tensor] | None = None
    if batch.staleness and factors is None:
        old = dict(enumerate(batch.rollouts.logprobs))
    elif config.optim.updates_per_rollout > 1:
        old = scores.logprobs
    coefficients = replace(
        coefficients,
        advantages=grpo.advantages(rewards_PG, method, scheduled.policy),
        kd_weight=kd_weight_R,
        old_logprobs=old,
        sampler_weights=factors,
    )
    return Prepared(coefficients, metrics)


def score(
    run: Run, batch: Batch, coefficients: CompletionCoefficients, recorder: SampleRecorder | None
) -> RolloutScores:
    """Score every completion with a reward, all ranks together; the teacher's part only where its
    log-probabilities are added to the reward."""
    if run.config.method.kd != "reward":
        coefficients = replace(coefficients, kd_weight=torch.zeros_like(coefficients.kd_weight))
    packs = packs_of(batch, coefficients, run.config, run.world)
    part = score_packs(run.policy, run.teachers, packs, recorder)
    return RolloutScores.join(run.world.share_packs(lambda: part))


def prompts_of_teachers(run: Run, batch: Batch) -> list[Tensor] | None:
    """Encode what teachers in this process read in place of the prompts; None: the prompts."""
    if run.config.data.teacher_template is None or not run.teachers.local:
        return None
    return teacher_prompts(run.tokenizer, batch.examples, run.config.data)


def query_server(
    run: Run, batch: Batch, coefficients: CompletionCoefficients, distilled_R: Tensor
) -> list[TeacherReply | None]:
    """Get what the method reads of the teachers' servers for the distilled completions.

    Each rank queries for a share of those that are not known yet: of log-probabilities, all ranks
    get all; states, which are large, stay on the rank whose packs need them.

    Returns: R, None where there is none.
    """
    known, teachers = batch.teacher_replies, run.teachers
    number_R = teachers.numbers(batch.examples)
    rollouts = batch.rollouts
    if run.config.data.teacher_template is not None:
        rollouts = as_teacher_reads(run.tokenizer, batch.examples, run.config.data, rollouts)
    missing_R = distilled_R & torch.tensor([reply is None for reply in known])
    shared = run.config.method.reads_logprobs
    ranks_R = torch.arange(len(known)) % run.world.size
    own_R = ranks_R == run.world.rank if shared else packed_here(run, batch, coefficients)
    mine: list[TeacherReply | None] = []

    def query_share() -> list[TeacherReply | None] | None:
        try:
            mine.extend(
                teachers.collect(rollouts, missing_R & own_R, number_R, {}, run.interrupt.poll)
            )
        except Stopped:
            return None
        return mine if shared else []

    parts = [part for part in run.world.share(query_share) if part is not None]
    if len(parts) < run.world.size:
        raise Stopped
    candidates = zip(known, *(parts if shared else [mine]), strict=True)
    return [next((x for x in replies if x is not None), None) for replies in candidates]


def packed_here(run: Run, batch: Batch, coefficients: CompletionCoefficients) -> Tensor:
    """Say which completions this rank packs in any update of the step, [R] bool."""
    P, G = batch.rewards.shape
    here_R = torch.zeros(P * G, dtype=torch.bool)
    for used_R in grpo.minibatches(P, G, run.config.optim.updates_per_rollout):
        weights_R = coefficients.token_weights * used_R
        part = replace(coefficients, token_weights=weights_R)
        for packed in packs_of(batch, part, run.config, run.world):
            here_R[packed.rollout] = True
    return here_R


def with_replies(
    coefficients: CompletionCoefficients,
    method: MethodConfig,
    replies: Sequence[TeacherReply | None],
) -> CompletionCoefficients:
    """Put a server's replies where the method reads them."""
    topk = [reply if isinstance(reply, TopkScores) else None for reply in replies]
    tensors = [reply if isinstance(reply, Tensor) else None for reply in replies]
    if method.is_topk:
        sampled = [None if scores is None else scores.sampled for scores in topk]
        return replace(coefficients, teacher_topk=topk, teacher_logprobs=sampled)
    if method.is_exact:
        return replace(coefficients, teacher_states=tensors)
    return replace(coefficients, teacher_logprobs=tensors)


def packs_of(
    batch: Batch, coefficients: CompletionCoefficients, config: TrainConfig, world: World
) -> Iterable[PackedBatch]:
    """Pack this rank's micro-batches of a step."""
    return pack(
        batch.rollouts,
        coefficients,
        config.optim.micro_batch_tokens,
        rank=world.data_rank,
        ranks=world.data_size,
    )


def correction(
    logprobs: Mapping[int, Tensor], rollouts: Rollouts, method: MethodConfig
) -> tuple[dict[int, Tensor], dict[str, float | None]]:
    """Compute the importance weights of each completion's tokens, and report their mean and the
    share of tokens that sampler_cap truncated or masked."""
    weights, limited = {}, []
    for r, trainer in logprobs.items():
        weights[r], beyond = grpo.sampler_weights(
            trainer, rollouts.logprobs[r], method.sampler_correction, method.sampler_cap
        )
        limited.append(beyond)
    share = torch.cat(limited).double().mean().item()
    mean = torch.cat(list(weights.values())).double().mean().item()
    return weights, {"sampler_weight_mean": mean, "sampler_limited": share}


def _measured(
    sums: dict[str, Tensor], method: MethodConfig, teachers: Sequence[str]
) -> dict[str, float | None]:
    """Report what must be measured before the first update, or is measured only then.

    Later updates would mix their own changes into the sampler mismatch; the KL to a teacher that is
    added to the reward is seen only here.
    """
    if not sums:
        return {}
    names = [*MISMATCH]
    if method.kd == "reward":
        names += ["kl_teacher", "teacher_log_ratio", "k2", "kd_share"]
        names += [f"teacher_log_ratio_p{q}" for q in PERCENTILES]
        of_each = ("kl_teacher", "teacher_log_ratio", "kd_share")
        names += [f"{key}/{teacher}" for teacher in teachers for key in of_each]
    means = token_means(sums, teachers)
    return {name: means[name] for name in names}
