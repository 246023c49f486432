"""Scores completions without a gradient, with the weights that sampled them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdrl_train.batch import CompletionCoefficients, Rollouts
from kdrl_train.config import TrainConfig
from kdrl_train.copies import to_host
from kdrl_train.method.metrics import LARGEST, add_sums, teacher_sums, token_means
from kdrl_train.model.fsdp import reshard
from kdrl_train.model.packing import PackedBatch, pack
from kdrl_train.model.policy import Policy
from kdrl_train.model.teachers import Teachers
from kdrl_train.ranks import World
from kdrl_train.step.samples import SampleRecorder

PROBED = 16
"""Completions whose log-probabilities probe_mismatch compares, each of another prompt."""
MISMATCH = ("sampler_mismatch_mean", "sampler_mismatch_max")


@dataclass(frozen=True, slots=True)
class RolloutScores:
    """Log-probabilities of completions at the weights they were sampled from."""

    logprobs: dict[int, Tensor] = field(default_factory=dict)
    """Completion -> [T] float32 nats, of the trainer."""
    teacher_log_ratio: dict[int, float] = field(default_factory=dict)
    """Completion -> sum over its tokens of log p - log q; of the distilled ones only."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """policy.token_sums of all tokens."""

    @classmethod
    def join(cls, parts: Sequence["RolloutScores"]) -> "RolloutScores":
        """Join the scores of all ranks: union of the mappings, sum of the sums."""
        whole = cls()
        for part in parts:
            whole.logprobs.update(part.logprobs)
            whole.teacher_log_ratio.update(part.teacher_log_ratio)
            whole.sums.update(add_sums(whole.sums, part.sums))
        return whole


@torch.no_grad()
def score_packs(
    policy: Policy,
    teachers: Teachers | None,
    packs: Iterable[PackedBatch],
    recorder: SampleRecorder | None = None,
) -> RolloutScores:
    """Compute log-probabilities of packs without a gradient, and the teacher's where distilled.

    It is the pass of the loss itself, so that where nothing has changed the ratio of the first
    update is 1, and columns beyond the vocabulary are left out here too.
    """
    policy.eval()
    scores = RolloutScores()
    sums: dict[str, Tensor] = {}
    passes = []
    for micro_batch in packs:
        batch = micro_batch.to(policy.device)
        head = None if teachers is None else teachers.head(batch)
        # nobody reads the loss; a rank without completions of this turn has no tokens to divide by
        out = policy(batch, batch.token_weights.sum().clamp(min=1), head)
        computed = out.logprobs, out.teacher_logprobs
        passes.append((micro_batch.rollout, micro_batch.kd_weight, computed))
        sums = add_sums(sums, out.sums)
        if teachers is not None and teachers.several:
            sums = add_sums(sums, teacher_sums(out.sums, teachers.names[batch.teacher]))
        if recorder is not None:
            recorder.add(micro_batch, out)
    by_pass = {(i, j): x for i, (*_, out) in enumerate(passes) for j, x in enumerate(out)}
    host = to_host({k: x for k, x in by_pass.items() if x is not None})  # no pass waits for another
    for turn, (rollout, kd_weight, _) in enumerate(passes):
        _keep(scores, rollout, kd_weight, host[turn, 0], host.get((turn, 1)))
    scores.sums.update(to_host(sums))
    return scores


def _keep(
    scores: RolloutScores,
    rollout: Tensor,
    kd_weight: Tensor,
    logprobs: Tensor,
    teacher: Tensor | None,
) -> None:
    """Add the log-probabilities [N] of a pack, and the teacher's, to the scores.

    rollout, kd_weight: of PackedBatch. All are on the CPU.
    """
    completions, counts = rollout.unique_consecutive(return_counts=True)
    parts = logprobs.split(counts.tolist())
    scores.logprobs.update(zip(completions.tolist(), parts, strict=True))
    if teacher is not None:
        log_ratio = (logprobs - teacher).double()
        distilled = log_ratio.where(kd_weight > 0, 0.0).split(counts.tolist())
        totals = [part.sum().item() for part in distilled]
        scores.teacher_log_ratio.update(zip(completions.tolist(), totals, strict=True))


def probe_mismatch(
    policy: Policy, rollouts: Rollouts, config: TrainConfig, world: World
) -> dict[str, float | None]:
    """Compare the sampler's log-probabilities with the trainer's present ones: MISMATCH.

    It reads the first completion of PROBED prompts, or of one for each rank if these are more, by a
    forward pass. They are spread over the step, since each rank has drawn a part of it with an
    engine of its own. All ranks call it together.
    """
    size, prompts = config.sampling.group_size, config.sampling.prompts_per_step
    count = min(max(PROBED, world.size), prompts)
    places = [size * (i * prompts // count) for i in range(count)]
    probed = Rollouts(
        prompt_ids=[rollouts.prompt_ids[r] for r in places],
        completion_ids=[rollouts.completion_ids[r] for r in places],
        logprobs=[rollouts.logprobs[r] for r in places],
        truncated=rollouts.truncated[places],
        texts=[rollouts.texts[r] for r in places],
    )
    none, all_used = torch.zeros(len(places)), torch.ones(len(places))
    packs = pack(
        probed,
        CompletionCoefficients(advantages=none, kd_weight=none, token_weights=all_used),
        config.optim.micro_batch_tokens,
        rank=world.data_rank,
        ranks=world.data_size,
    )
    sums = score_packs(policy, None, packs).sums
    reshard(policy)
    means = token_means(world.sum(sums, largest=LARGEST))
    return {name: means[name] for name in MISMATCH}
