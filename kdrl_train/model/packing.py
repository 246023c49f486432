"""Packs completions without padding, each sequence with its own positions from 0.

A pack is [1, T] tokens. transformers sees positions that restart and lets no token attend across a
sequence's start (masking_utils.find_packed_sequence_indices, in versions 5.17 to 5.23 the same);
probe.py tests this on every model before the first step.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrl_train.batch import CompletionCoefficients, Rollouts, TopkScores
from kdrl_train.copies import to_device


class TeacherInputs(NamedTuple):
    """The sequences of a pack as a teacher reads them, whose prompts are others. The completions,
    and so the N loss tokens, are those of the pack."""

    input_ids: Tensor
    """[1, T'] int64."""
    position_ids: Tensor
    """[1, T'] int64."""
    loss_index: Tensor
    """[N] int64: places in T'."""
    lengths: tuple[int, ...]
    """Tokens of each sequence; they sum to T'."""

    def to(self, device: torch.device | str) -> "TeacherInputs":
        """Copy the tensors to another device."""
        ids, positions, index = (to_device(part, device) for part in self[:3])
        return TeacherInputs(ids, positions, index, self.lengths)


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
    """Tokens of each sequence in the pack; they sum to T."""
    needs_teacher: bool
    """Whether any token is distilled, here or in the pack of another rank at the same turn."""
    teacher: int = 0
    """The number of the teacher of all its completions."""
    teacher_inputs: TeacherInputs | None = None
    """What the teacher reads, if that is not what the policy reads."""
    teacher_states: Tensor | None = None
    """[N, H_t] hidden states of the teacher, from a server, as teacher_logprobs."""
    old_logprobs: Tensor | None = None
    """[N] float32, nats: what the ratio is taken to; None: strictly on-policy."""
    teacher_logprobs: Tensor | None = None
    """[N] float32, nats, from a server; NaN in completions that it was not queried for. None: not
    from a server, or no token is distilled."""

    topk_ids: Tensor | None = None
    """[N, K] int64: the teacher's likeliest tokens, from a server, as teacher_logprobs; -1 in
    completions that it was not queried for."""
    topk_logprobs: Tensor | None = None
    """[N, K] float32, nats, at topk_ids."""
    active_rows: int | None = None
    """How many token_weights are not 0; None: not counted. A GPU would have to be waited for."""
    all_distilled: bool = False
    """Whether the kd_weight of all those tokens is above 0."""
    all_learn: bool = False
    """Whether the advantage of all those tokens is not 0, or their kd_weight is above it."""

    @property
    def teacher_topk(self) -> TopkScores | None:
        """The teacher's likeliest tokens, where a server gave them."""
        if self.teacher_logprobs is None or self.topk_ids is None or self.topk_logprobs is None:
            return None
        return TopkScores(self.teacher_logprobs, self.topk_ids, self.topk_logprobs)

    @property
    def token_numbers(self) -> Tensor:
        """[N] int64: a number for each token of the step, however it is packed."""
        return (self.rollout << 32) + self.position_ids[0, self.loss_index]

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Copy the batch to another device."""
        values = {name: getattr(self, name) for name in self.__slots__}
        moved: dict[str, Any] = {
            name: to_device(value, device)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        if self.teacher_inputs is not None:
            moved["teacher_inputs"] = self.teacher_inputs.to(device)
        return replace(self, **moved)


def first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Divide `lengths` into packs of at most `budget` by first-fit-decreasing; returns indices.

    A length above the budget gets a pack of its own. Within a pack and among packs the order of the
    input is kept, so that the result is a pure function of its arguments.
    """
    loads: list[int] = []
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for place, load in enumerate(loads):
            if load + lengths[index] <= budget:
                loads[place] += lengths[index]
                packs[place].append(index)
                break
        else:
            loads.append(lengths[index])
            packs.append([index])
    return sorted(sorted(members) for members in packs)


def balance(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Give each rank its share of `lengths`: the longest first, to the rank with the least so far
    (LPT). Returns indices for each rank."""
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += lengths[index]
        shares[rank].append(index)
    return [sorted(members) for members in shares]


def feed(prompts: Sequence[Tensor], completions: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate sequences into one pack.

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
    coefficients: CompletionCoefficients,
    micro_batch_tokens: int,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[PackedBatch]:
    """Yield this rank's micro-batches of one step, on the CPU; every rank gets as many.

    Args:
        rollouts: R completions with their prompts, of all ranks.
        coefficients: of the R completions. Those of token weight 0 are left out.
        micro_batch_tokens: budget T of one pack; a longer sequence has a pack of its own.
        rank, ranks: a rank whose turns end before those of the others gets packs without loss
            tokens. The packs of one turn have the same teacher on all ranks.
    """
    completions = rollouts.completion_ids
    longest = [len(prompt) for prompt in rollouts.prompt_ids]
    if coefficients.teacher_prompts is not None:  # neither the policy nor the teacher reads more
        longest = [
            max(n, len(x)) for n, x in zip(longest, coefficients.teacher_prompts, strict=True)
        ]
    used = [r for r in range(len(completions)) if coefficients.token_weights[r] != 0]
    numbers = [0] * len(completions)
    if coefficients.teacher is not None:
        numbers = coefficients.teacher.tolist()
    for teacher in sorted({numbers[r] for r in used}):
        members = [r for r in used if numbers[r] == teacher]
        lengths = [longest[r] + len(completions[r]) - 1 for r in members]
        packs_of_ranks = []
        for share in balance(lengths, ranks):
            packs = first_fit([lengths[i] for i in share], micro_batch_tokens)
            packs_of_ranks.append([[members[share[m]] for m in part] for part in packs])
        for turn in itertools.zip_longest(*packs_of_ranks, fillvalue=[]):
            distilled = any(coefficients.kd_weight[r] > 0 for part in turn for r in part)
            yield _pack(rollouts, coefficients, turn[rank], teacher, needs_teacher=distilled)


def _kd_weight(
    coefficients: CompletionCoefficients, rollout: Tensor, lengths: Tensor, truncated: Tensor
) -> Tensor:
    """Weight the distillation of each token; 0 where ends, or what follows a prefix, are left out.

    Args:
        rollout: [T], the completion of each token.
        lengths, truncated: of each completion of the pack.
    """
    kd_weight = coefficients.kd_weight[rollout]
    if not coefficients.distil_eos:
        last = lengths.cumsum(dim=0) - 1
        kd_weight[last[~truncated]] = 0
    if coefficients.kd_prefix < 1:
        places = torch.cat([torch.arange(n) for n in [0, *lengths.tolist()]])
        # 1e-9: a product of floats may lie just above a whole number
        prefix = (coefficients.kd_prefix * lengths.double() - 1e-9).ceil()
        kd_weight[places >= prefix.repeat_interleave(lengths)] = 0
    return kd_weight


def _pack(
    rollouts: Rollouts,
    coefficients: CompletionCoefficients,
    members: list[int],
    teacher: int,
    *,
    needs_teacher: bool,
) -> PackedBatch:
    """Pack the completions `members`; each has a prompt of at least one token.

    Without members the pack is one token that nothing is learnt from.
    """
    prompts, completions = (
        [ids[r] for r in members] for ids in (rollouts.prompt_ids, rollouts.completion_ids)
    )
    if members:
        input_ids, position_ids, loss_index = feed(prompts, completions)
    else:
        input_ids, position_ids, loss_index = (
            torch.zeros(shape, dtype=torch.int64) for shape in _NO_LOSS
        )
    lengths = torch.tensor([len(completion) for completion in completions], dtype=torch.int64)
    rollout = torch.tensor(members, dtype=torch.int64).repeat_interleave(lengths)
    kd_weight = _kd_weight(coefficients, rollout, lengths, rollouts.truncated[members])
    token_weights = coefficients.token_weights[rollout]
    old, factors = coefficients.old_logprobs, coefficients.sampler_weights
    if factors is not None:
        token_weights = token_weights * _cat(factors[r] for r in members)
    fed = [len(p) + len(c) - 1 for p, c in zip(prompts, completions, strict=True)]
    advantages = coefficients.advantages[rollout]
    used, distilled = token_weights != 0, kd_weight > 0
    return PackedBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        loss_index=loss_index,
        tokens=torch.cat([loss_index[:0], *completions]),
        rollout=rollout,
        sampled_logprobs=_cat(rollouts.logprobs[r] for r in members),
        advantages=advantages,
        token_weights=token_weights,
        kd_weight=kd_weight,
        lengths=tuple(fed) or (1,),
        needs_teacher=needs_teacher,
        teacher=teacher,
        teacher_inputs=_teacher_inputs(rollouts, coefficients, members),
        old_logprobs=None if old is None else _cat(old[r] for r in members),
        active_rows=int(used.sum()),
        all_distilled=bool((distilled | ~used).all()),
        all_learn=bool((distilled | (advantages != 0) | ~used).all()),
        **_from_servers(coefficients, members, lengths),
    )


_NO_LOSS = ((1, 1), (1, 1), (0,))
"""Shapes of input_ids, position_ids and loss_index in a pack without completions."""


def _cat(parts: Iterable[Tensor]) -> Tensor:
    """Concatenate any number of parts into [N] float32."""
    return torch.cat([torch.zeros(0), *parts])


def _of_server(
    replies: Sequence[Tensor | None], kd_weight: Tensor, lengths: Tensor, absent: float
) -> Tensor | None:
    """Concatenate what a server said of each completion of a pack, [T, ...]; None where it has
    scored none that is distilled: the pack's one teacher may be in this process.

    A completion that it was not queried for has kd weight 0 and gets `absent`.

    Args:
        kd_weight, lengths: of the completions.
    """
    scored = [reply is not None for reply in replies]
    if not (torch.tensor(scored, dtype=torch.bool) & (kd_weight > 0)).any():
        return None
    like = next(reply for reply in replies if reply is not None)
    shapes = ((length, *like.shape[1:]) for length in lengths.tolist())
    parts = zip(replies, shapes, strict=True)
    return torch.cat([like.new_full(n, absent) if reply is None else reply for reply, n in parts])


def _from_servers(
    coefficients: CompletionCoefficients, members: list[int], lengths: Tensor
) -> dict[str, Tensor | None]:
    """Concatenate what servers said of the completions `members`, by the fields of PackedBatch.

    kk.kdrl_loss reads no log-probability of a completion that is not distilled, and any other
    reader gets NaN. Its states are 0, which the head can read: NaN would reach the gradient of its
    tokens. Its likeliest tokens are none, -1.
    """
    empty: list[Any] = [None] * len(coefficients.kd_weight)
    topk = coefficients.teacher_topk or empty
    columns: dict[str, tuple[Sequence[Any], float]] = {
        "teacher_logprobs": (coefficients.teacher_logprobs or empty, torch.nan),
        "teacher_states": (coefficients.teacher_states or empty, 0),
        "topk_ids": ([reply and reply.ids for reply in topk], -1),
        "topk_logprobs": ([reply and reply.logprobs for reply in topk], 0),
    }
    kd_weight = coefficients.kd_weight[members]
    return {
        name: _of_server([replies[r] for r in members], kd_weight, lengths, absent)
        for name, (replies, absent) in columns.items()
    }


def _teacher_inputs(
    rollouts: Rollouts, coefficients: CompletionCoefficients, members: list[int]
) -> TeacherInputs | None:
    """Put the teacher's prompts before the completions; None where it reads the policy's."""
    prompts = coefficients.teacher_prompts
    if prompts is None or not members:
        return None
    completions = [rollouts.completion_ids[r] for r in members]
    fed = [len(prompts[r]) + len(rollouts.completion_ids[r]) - 1 for r in members]
    return TeacherInputs(*feed([prompts[r] for r in members], completions), tuple(fed))
