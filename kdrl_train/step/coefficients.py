"""What the loss of a step reads beside its tokens: decided once, before the step's first update.

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
(arXiv:2110.00641, arXiv:2505.24298). p / b times w would count p0 / b twice and is never built.
Which prefixes b visits is left as it is, as in PPO.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrl_train.batch import Batch, Rollouts
from kdrl_train.config import TrainConfig
from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.histogram import PERCENTILES
from kdrl_train.method.metrics import token_means
from kdrl_train.method.schedules import History, schedule_value
from kdrl_train.model.packing import PackedBatch, pack
from kdrl_train.runfolder.log import Stages
from kdrl_train.runfolder.signals import Stopped
from kdrl_train.step.run import Run
from kdrl_train.step.samples import SampleRecorder
from kdrl_train.step.score import Scores, join, score_packs


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """One step's coefficients. Everything is on the CPU and the same for all ranks."""

    advantages: Tensor
    """[R] float32."""
    kd_weight: Tensor
    """[R] float32: beta times group factor times mask."""
    old_logprobs: Mapping[int, Tensor] | None
    """Completion -> [T] nats that the ratio is taken to; None: those of the update itself."""
    sampler_weights: Mapping[int, Tensor] | None
    """Completion -> [T] importance weights between sampler and trainer; None: no correction."""
    teacher_logprobs: Sequence[Tensor | None] | None
    """R of [T] nats, from a server, None where it was not asked; None: there is no server."""
    metrics: dict[str, float | None]
    """For the step's row; they take the place of those that the updates measure."""


def needs_scores(config: TrainConfig, staleness: int = 0) -> bool:
    """Whether a step needs the pass of score_packs before its first update."""
    method = config.method
    return (
        (config.optim.updates_per_rollout > 1 and not staleness)
        or method.sampler_correction != "none"
        or method.kd == "reward"
    )


def prepare(
    run: Run, batch: Batch, step: int, stages: Stages, trace: SampleRecorder | None = None
) -> Terms:
    """Coefficients of a step's completions; the models run only where needs_scores says so."""
    config, method, rewards_PG = run.config, run.config.method, batch.rewards
    scores, remote = Scores(), None
    beta = schedule_value(method.kd_coef, step, run.history)
    distilled_R = grpo.kd_weights(rewards_PG, method, beta)
    if run.remote is not None:
        wanted_R = (distilled_R > 0) & ~rewards_PG.isnan().flatten()
        with stages("teacher") if wanted_R.any() else nullcontext():
            remote = ask_server(run, batch, wanted_R)
    if needs_scores(config, batch.staleness):
        with stages("score"):
            if method.kd != "reward":
                distilled_R = torch.zeros_like(distilled_R)
            rows = _rows(run, batch, distilled_R, remote)
            own = score_packs(run.policy, run.teacher, rows, trace)
            scores = join(run.world.share(lambda: own))
    gaps_R = torch.zeros(rewards_PG.numel(), dtype=torch.float64)
    for r, gap in scores.gaps.items():
        gaps_R[r] = gap
    terms = grpo.completion_terms(rewards_PG, method, step, run.history, gaps_R)
    weights, metrics = None, coefficients(method, rewards_PG, step, run.history)
    if method.sampler_correction != "none":
        weights, found = correction(scores.logprobs, batch.rollouts, method)
        metrics |= found
    metrics |= _measured(scores.sums, method)
    old: Mapping[int, Tensor] | None = None
    if batch.staleness and weights is None:
        old = dict(enumerate(batch.rollouts.logprobs))
    elif config.optim.updates_per_rollout > 1:
        old = scores.logprobs
    return Terms(
        advantages=terms[0],
        kd_weight=terms[1],
        old_logprobs=old,
        sampler_weights=weights,
        teacher_logprobs=remote,
        metrics=metrics,
    )


def ask_server(run: Run, batch: Batch, wanted_R: Tensor) -> list[Tensor | None]:
    """Teacher log-probabilities [T] of the wanted completions from its server, those asked for
    early and the rest, each rank a share; R, None where there is none."""
    assert run.remote is not None
    known, remote = batch.teacher_logprobs, run.remote
    missing_R = wanted_R & torch.tensor([one is None for one in known])
    places = torch.arange(len(known)) % run.world.size
    own_R = missing_R & (places == run.world.rank)

    def own_part() -> list[Tensor | None] | None:
        try:
            return remote.collect(batch.rollouts, own_R, {}, run.interrupt.poll)
        except Stopped:
            return None

    parts = [part for part in run.world.share(own_part) if part is not None]
    if len(parts) < run.world.size:
        raise Stopped
    answers = zip(known, *parts, strict=True)
    return [next((one for one in found if one is not None), None) for found in answers]


def _rows(
    run: Run, batch: Batch, kd_weight_R: Tensor, teacher_logprobs: list[Tensor | None] | None
) -> Iterable[PackedBatch]:
    """This rank's packed rows, of every completion with a reward."""
    config, rewards_PG = run.config, batch.rewards
    return pack(
        batch.rollouts,
        advantages_R=torch.zeros_like(kd_weight_R),
        weights_R=(~rewards_PG.isnan()).float().flatten(),
        kd_weight_R=kd_weight_R,
        micro_batch_tokens=config.optim.micro_batch_tokens,
        rank=run.world.rank,
        ranks=run.world.size,
        teacher_logprobs=teacher_logprobs,
        distil_eos=config.method.kd_eos == "keep",
    )


def coefficients(
    method: MethodConfig, rewards_PG: Tensor, step: int, history: History
) -> dict[str, float | None]:
    """kd_coef (before the mask, mean over groups) and policy_coef of a step; None without one."""
    kd = schedule_value(method.kd_coef, step, history)
    kd *= grpo.group_factor(method.kd_coef, rewards_PG).mean().item()
    policy = schedule_value(method.policy_coef, step, history)
    return {
        "kd_coef": None if method.kd is None else kd,
        "policy_coef": None if method.policy == "off" else policy,
    }


def correction(
    logprobs: Mapping[int, Tensor], rollouts: Rollouts, method: MethodConfig
) -> tuple[dict[int, Tensor], dict[str, float | None]]:
    """Importance weights of each completion's tokens; their mean, and the share of tokens that
    sampler_cap truncated or masked."""
    weights, limited = {}, []
    for r, trainer in logprobs.items():
        weights[r], held = grpo.sampler_weights(
            trainer, rollouts.logprobs[r], method.sampler_correction, method.sampler_cap
        )
        limited.append(held)
    share = torch.cat(limited).double().mean().item()
    mean = torch.cat(list(weights.values())).double().mean().item()
    return weights, {"sampler_weight_mean": mean, "sampler_limited": share}


def _measured(sums: dict[str, Tensor], method: MethodConfig) -> dict[str, float | None]:
    """What must be measured before the first update, or only is here: the gap between sampler and
    trainer, which later updates would mix with their own changes, and a rewarded teacher's KL."""
    if not sums:
        return {}
    names = ["sampler_mismatch_mean", "sampler_mismatch_max"]
    if method.kd == "reward":
        names += ["kl_teacher", "teacher_log_ratio", "k2", "kd_share"]
        names += [f"teacher_log_ratio_p{q}" for q in PERCENTILES]
    means = token_means(sums)
    return {name: means[name] for name in names}
