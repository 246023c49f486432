"""Scores completions without a gradient, at the weights that they were sampled from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdrl_train.method.metrics import add_sums
from kdrl_train.model.packing import PackedBatch
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.step.samples import SampleRecorder


@dataclass(frozen=True, slots=True)
class Scores:
    """Completions at the weights they were sampled from. Those of several ranks add up: union of
    the mappings, sum of the sums (add_sums)."""

    logprobs: dict[int, Tensor] = field(default_factory=dict)
    """Completion -> [T] float32 nats, of the trainer."""
    gaps: dict[int, float] = field(default_factory=dict)
    """Completion -> sum over its tokens of log q - log p; of the distilled ones only."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """grpo.token_sums of all tokens."""


@torch.no_grad()
def score_packs(
    policy: Policy,
    teacher: Teacher | None,
    rows: Iterable[PackedBatch],
    trace: SampleRecorder | None = None,
) -> Scores:
    """Log-probabilities of packed rows without a gradient, and the teacher's where distilled.

    It is the pass of the loss itself, so that where nothing has changed the ratio of the first
    update is 1, and columns beyond the vocabulary are left out here too.
    """
    policy.eval()
    scores = Scores()
    sums: dict[str, Tensor] = {}
    for row in rows:
        batch = row.to(policy.device)
        head = teacher(batch) if teacher is not None and row.needs_teacher else None
        out = policy(batch, batch.token_weights.sum(), head)
        completions, counts = row.rollout.unique_consecutive(return_counts=True)
        parts = out.logprobs.cpu().split(counts.tolist())
        scores.logprobs.update(zip(completions.tolist(), parts, strict=True))
        if out.teacher_logprobs is not None:
            gap = (out.teacher_logprobs - out.logprobs).double().cpu()
            gaps = gap.where(row.kd_weight > 0, 0.0).split(counts.tolist())
            totals = [part.sum().item() for part in gaps]
            scores.gaps.update(zip(completions.tolist(), totals, strict=True))
        sums = add_sums(sums, out.sums)
        if trace is not None:
            trace.add(row, out)
    scores.sums.update({name: value.cpu() for name, value in sums.items()})
    return scores


def join(parts: Sequence[Scores]) -> Scores:
    """Scores of all ranks."""
    whole = Scores()
    for part in parts:
        whole.logprobs.update(part.logprobs)
        whole.gaps.update(part.gaps)
        total = add_sums(whole.sums, part.sums)
        whole.sums.update(total)
    return whole
