"""Completions packed into rows without padding, each sequence with its own positions from 0.

A packed row is [1, T] tokens. transformers sees positions that restart and lets no token attend
across a sequence's start (masking_utils.find_packed_sequence_indices, in versions 5.17 to 5.23 the
same); policy.py probes this on every model before the first step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdrl_train.rollout import Rollouts


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """One forward pass: T fed tokens, N loss tokens. Not a pytree on purpose: FSDP2 casts the
    floating-point tensors among a module's arguments to its compute dtype, and these stay float32.
    """

    input_ids: Tensor
    """[1, T] int64: for each sequence its prompt and its completion without the last token."""
    position_ids: Tensor
    """[1, T] int64, from 0 in each sequence."""
    rows: Tensor
    """[N] int64: places in T whose hidden state predicts a completion token."""
    tokens: Tensor
    """[N] int64: the completion tokens."""
    rollout: Tensor
    """[N] int64: which completion of the step the token belongs to."""
    sampled_logprobs: Tensor
    """[N] float32, nats: as sampled."""
    advantages: Tensor
    """[N] float32."""
    token_weights: Tensor
    """[N] float32."""
    kd_weight: Tensor
    """[N] float32: beta times the mask."""
    teacher_logprobs: Tensor | None = None
    """[N] float32, nats, from a server; NaN in completions that it was not asked for. None: not
    from a server, or no token is distilled."""

    @property
    def needs_teacher(self) -> bool:
        """Whether any token is distilled. Decided on the CPU, before the batch moves."""
        return bool(((self.kd_weight > 0) & (self.token_weights > 0)).any())

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        moved = {k: v.to(device, non_blocking=True) for k, v in fields.items() if v is not None}
        return PackedBatch(**moved)


def bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit-decreasing: indices of `lengths` in bins whose sum is at most `budget`.

    A length above the budget gets a bin of its own. Within a bin and among bins the order of the
    input is kept, so that the result is a pure function of its arguments.
    """
    loads: list[int] = []
    out: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for place, load in enumerate(loads):
            if load + lengths[index] <= budget:
                loads[place] += lengths[index]
                out[place].append(index)
                break
        else:
            loads.append(lengths[index])
            out.append([index])
    return sorted(sorted(members) for members in out)


def feed(prompts: Sequence[Tensor], completions: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences as one packed row.

    Args:
        prompts, completions: token ids, [T] int64 each, at least one token each.
    Returns: input_ids [1, T] and position_ids [1, T] of each prompt and its completion without the
        last token; rows [N], the places whose hidden states predict the completions' tokens.
    """
    ids, positions, rows = [], [], []
    start = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids.append(torch.cat([prompt, completion[:-1]]))
        positions.append(torch.arange(len(ids[-1])))
        rows.append(torch.arange(len(completion)) + start + len(prompt) - 1)
        start += len(ids[-1])
    return torch.cat(ids)[None], torch.cat(positions)[None], torch.cat(rows)


def pack(
    rollouts: Rollouts,
    *,
    advantages_R: Tensor,
    weights_R: Tensor,
    kd_weight_R: Tensor,
    micro_batch_tokens: int,
    teacher_logprobs: Sequence[Tensor | None] | None = None,
    distil_eos: bool = True,
) -> Iterator[PackedBatch]:
    """Micro-batches of one step, on the CPU.

    Args:
        rollouts: R completions with their prompts.
        advantages_R, weights_R, kd_weight_R: [R] float32, each the same for all tokens of a
            completion. Completions of weight 0 are left out: they carry no loss.
        micro_batch_tokens: budget T of one row; a longer sequence has a row of its own.
        teacher_logprobs: R of [T] nats, from a server, None where it was not asked; None: none.
        distil_eos: False takes the kd weight from the token that ends a completion.
    """
    prompts, completions = rollouts.prompt_ids, rollouts.completion_ids
    used = [r for r in range(len(completions)) if weights_R[r] != 0]
    lengths = [len(prompts[r]) + len(completions[r]) - 1 for r in used]
    for places in bins(lengths, micro_batch_tokens):
        members = [used[place] for place in places]
        row = _row(rollouts, members, advantages_R, weights_R, kd_weight_R, distil_eos)
        if teacher_logprobs is not None and row.needs_teacher:
            row = replace(row, teacher_logprobs=_scores(rollouts, members, teacher_logprobs))
        yield row


def _row(
    rollouts: Rollouts,
    members: list[int],
    advantages: Tensor,
    weights: Tensor,
    kd_weight: Tensor,
    distil_eos: bool,
) -> PackedBatch:
    """One packed row of the completions `members`; each has a prompt of at least one token."""
    completions = [rollouts.completion_ids[r] for r in members]
    input_ids, position_ids, rows = feed([rollouts.prompt_ids[r] for r in members], completions)
    lengths = torch.tensor([len(completion) for completion in completions])
    rollout = torch.tensor(members).repeat_interleave(lengths)
    kd_weight_N = kd_weight[rollout]
    if not distil_eos:
        last = lengths.cumsum(dim=0) - 1
        kd_weight_N[last[~rollouts.truncated[members]]] = 0
    return PackedBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        rows=rows,
        tokens=torch.cat(completions),
        rollout=rollout,
        sampled_logprobs=torch.cat([rollouts.logprobs[r] for r in members]),
        advantages=advantages[rollout],
        token_weights=weights[rollout],
        kd_weight=kd_weight_N,
    )


def _scores(
    rollouts: Rollouts, members: list[int], teacher_logprobs: Sequence[Tensor | None]
) -> Tensor:
    """[N] of the completions `members`; NaN in those that were not asked for, whose kd weight is 0:
    kk.kdrl_loss reads no such row, and whoever else does will notice."""
    unknown = [torch.full_like(rollouts.logprobs[r], torch.nan) for r in members]
    given = [teacher_logprobs[r] for r in members]
    return torch.cat([n if g is None else g for g, n in zip(given, unknown, strict=True)])
