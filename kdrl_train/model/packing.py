"""Completions packed into rows without padding, each sequence with its own positions from 0.

A packed row is [1, T] tokens. transformers sees positions that restart and lets no token attend
across a sequence's start (masking_utils.find_packed_sequence_indices, in versions 5.17 to 5.23 the
same); policy.py probes this on every model before the first step.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdrl_train.batch import Rollouts


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """One forward pass: T fed tokens, N loss tokens. Not a pytree on purpose: FSDP2 casts the
    floating-point tensors among a module's arguments to its compute dtype, and these stay float32.
    """

    input_ids: Tensor
    """[1, T] int64: for each sequence its prompt and its completion without the last token."""
    position_ids: Tensor
    """[1, T] int64, from 0 in each sequence."""
    loss_index: Tensor
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
    lengths: tuple[int, ...]
    """Tokens of each sequence in the row; they sum to T."""
    needs_teacher: bool
    """Whether any token is distilled, here or in the batch of another rank at the same turn."""
    old_logprobs: Tensor | None = None
    """[N] float32, nats: of the policy before the first update; None: strictly on-policy."""
    teacher_logprobs: Tensor | None = None
    """[N] float32, nats, from a server; NaN in completions that it was not asked for. None: not
    from a server, or no token is distilled."""

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        values = {name: getattr(self, name) for name in self.__slots__}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit-decreasing: indices of `lengths` in packs whose sum is at most `budget`.

    A length above the budget gets a pack of its own. Within a pack and among packs the order of the
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


def balance(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Longest first to the rank with the least so far (LPT): indices of `lengths` for each rank."""
    loads = [0] * ranks
    out: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += lengths[index]
        out[rank].append(index)
    return [sorted(members) for members in out]


def feed(prompts: Sequence[Tensor], completions: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences as one packed row.

    Args:
        prompts, completions: token ids, [T] int64 each, at least one token each.
    Returns: input_ids [1, T] and position_ids [1, T] of each prompt and its completion without the
        last token; loss_index [N], the places whose hidden states predict the completions' tokens.
    """
    ids, positions, loss_index = [], [], []
    start = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids.append(torch.cat([prompt, completion[:-1]]))
        positions.append(torch.arange(len(ids[-1])))
        loss_index.append(torch.arange(len(completion)) + start + len(prompt) - 1)
        start += len(ids[-1])
    return torch.cat(ids)[None], torch.cat(positions)[None], torch.cat(loss_index)


def pack(
    rollouts: Rollouts,
    *,
    advantages_R: Tensor,
    weights_R: Tensor,
    kd_weight_R: Tensor,
    micro_batch_tokens: int,
    rank: int = 0,
    ranks: int = 1,
    old_logprobs: Mapping[int, Tensor] | None = None,
    sampler_weights: Mapping[int, Tensor] | None = None,
    teacher_logprobs: Sequence[Tensor | None] | None = None,
    distil_eos: bool = True,
) -> Iterator[PackedBatch]:
    """Micro-batches of one step that are this rank's, on the CPU; as many on every rank.

    Args:
        rollouts: R completions with their prompts, of all ranks.
        advantages_R, weights_R, kd_weight_R: [R] float32, each the same for all tokens of a
            completion. Completions of weight 0 are left out: they carry no loss.
        micro_batch_tokens: budget T of one row; a longer sequence has a row of its own.
        rank, ranks: a rank whose turns end before those of the others has rows without loss tokens.
        old_logprobs: completion -> [T] nats, or None.
        sampler_weights: completion -> [T], factors of the tokens' weights, or None.
        teacher_logprobs: R of [T] nats, from a server, None where it was not asked; None: none.
        distil_eos: False takes the kd weight from the token that ends a completion.
    """
    prompts, completions = rollouts.prompt_ids, rollouts.completion_ids
    used = [r for r in range(len(completions)) if weights_R[r] != 0]
    lengths = [len(prompts[r]) + len(completions[r]) - 1 for r in used]
    plans = []
    for share in balance(lengths, ranks):
        rows = first_fit([lengths[i] for i in share], micro_batch_tokens)
        plans.append([[used[share[m]] for m in members] for members in rows])
    for turn in itertools.zip_longest(*plans, fillvalue=[]):
        distilled = any(kd_weight_R[r] > 0 for members in turn for r in members)
        members = turn[rank]
        row = _row(rollouts, members, advantages_R, weights_R, kd_weight_R, distil_eos, distilled)
        if old_logprobs is not None:
            row = replace(row, old_logprobs=_cat(old_logprobs[r] for r in members))
        if sampler_weights is not None:
            factors = _cat(sampler_weights[r] for r in members)
            row = replace(row, token_weights=row.token_weights * factors)
        if teacher_logprobs is not None and any(kd_weight_R[r] > 0 for r in members):
            row = replace(row, teacher_logprobs=_scores(rollouts, members, teacher_logprobs))
        yield row


def _row(
    rollouts: Rollouts,
    members: list[int],
    advantages: Tensor,
    weights: Tensor,
    kd_weight: Tensor,
    distil_eos: bool,
    needs_teacher: bool,
) -> PackedBatch:
    """One packed row of the completions `members`; each has a prompt of at least one token.

    Without members it is one token that nothing is learnt from.
    """
    prompts, completions = (
        [ids[r] for r in members] for ids in (rollouts.prompt_ids, rollouts.completion_ids)
    )
    if members:
        input_ids, position_ids, loss_index = feed(prompts, completions)
    else:
        input_ids, position_ids, loss_index = (torch.zeros(s, dtype=torch.int64) for s in _NO_LOSS)
    lengths = torch.tensor([len(completion) for completion in completions], dtype=torch.int64)
    rollout = torch.tensor(members, dtype=torch.int64).repeat_interleave(lengths)
    kd_weight_N = kd_weight[rollout]
    if not distil_eos:
        last = lengths.cumsum(dim=0) - 1
        kd_weight_N[last[~rollouts.truncated[members]]] = 0
    fed = [len(p) + len(c) - 1 for p, c in zip(prompts, completions, strict=True)]
    return PackedBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        loss_index=loss_index,
        tokens=torch.cat([loss_index[:0], *completions]),
        rollout=rollout,
        sampled_logprobs=_cat(rollouts.logprobs[r] for r in members),
        advantages=advantages[rollout],
        token_weights=weights[rollout],
        kd_weight=kd_weight_N,
        lengths=tuple(fed) or (1,),
        needs_teacher=needs_teacher,
    )


_NO_LOSS = ((1, 1), (1, 1), (0,))
"""Shapes of input_ids, position_ids and loss_index in a row without completions."""


def _cat(parts: Iterable[Tensor]) -> Tensor:
    """[N] float32, of any number of parts."""
    return torch.cat([torch.zeros(0), *parts])


def _scores(
    rollouts: Rollouts, members: list[int], teacher_logprobs: Sequence[Tensor | None]
) -> Tensor:
    """[N] of the completions `members`; NaN in those that were not asked for, whose kd weight is 0:
    kk.kdrl_loss reads no such row, and whoever else does will notice."""
    unknown = [torch.full_like(rollouts.logprobs[r], torch.nan) for r in members]
    given = [teacher_logprobs[r] for r in members]
    return torch.cat([n if g is None else g for g, n in zip(given, unknown, strict=True)])
