"""Chooses the attention of a model, and whether the sequences of a pack may share a row.

The first of these is taken that computes, on a miniature of the model, what the model's own
attention (transformers' SDPA or eager) computes on each sequence alone:

1. FlashAttention, or our `packed`, over packs;
2. the model's own attention over packs;
3. the model's own attention, one sequence a row.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels.head_config import backbone
from kdrl_train.model import attention, rotary
from kdrl_train.model.attention import Choice
from kdrl_train.model.miniature import CHOSEN_KEYS, ORIGINAL, VOCABULARY, has_number, miniature
from kdrl_train.model.policy import HeadedModel

ANYWHERE = (attention.NAME, "sdpa", "eager")
"""Attentions that compute on any device, in any dtype."""
LENGTHS = (5, 23, 12)
"""Tokens of the sequences of the test: below and above every length of a miniature."""
SHORT = (5, ORIGINAL, ORIGINAL - 1)
"""The same where sequences up to the original length alone may share a row."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Largest RMS difference of a sequence's hidden states, as a share of their RMS."""

TIES = "its queries choose their keys, and a longer row could break ties in another way"


@dataclass(frozen=True, slots=True)
class Specimen:
    """A miniature, and what its own attention computes of each sequence alone."""

    model: Any
    ids: list[Tensor]
    """[1, T] int64 of each sequence."""
    alone: list[Tensor]
    """[T, H] of each sequence."""
    longest: int | None
    """Of Choice."""


_chosen: dict[str, Choice] = {}
"""The choices of this process: policy, teacher and a sampling copy are often alike."""


def choose(
    model: Any, name: str | None, device: torch.device, dtype: torch.dtype, *, liger: bool = False
) -> Choice:
    """Choose how a transformers model computes packs.

    Args:
        name: model.attention, which leaves no other choice; None: the best that is right.
        device, dtype: of the run, in which FlashAttention and other kernels are tested. The rest is
            tested in float32 on the CPU, or on the device where liger-kernel's layers may stand in
            the model's classes.
    Raises: ValueError where the attention `name` is not the model's.
    """
    place = device if liger else torch.device("cpu")
    config = json.dumps(model.config.to_dict(), default=str, sort_keys=True)
    key = "\n".join(map(str, (type(model).__name__, name, place, device, dtype, config)))
    if key not in _chosen:
        names = attention.preferred(model, device, dtype) if name is None else [name]
        longest = rotary.longest(model.config.get_text_config())
        _chosen[key] = replace(_choose(model, names, (device, dtype), place), longest=longest)
    return _chosen[key]


def _choose(
    model: Any, names: list[str], run: tuple[torch.device, torch.dtype], place: torch.device
) -> Choice:
    """Take the first of several attentions that keeps packs apart, else the last without packs."""
    specimens: dict[tuple[torch.device, torch.dtype], Specimen] = {}
    ties = has_number(model.config, CHOSEN_KEYS)
    reasons = [TIES] * ties

    def fault(name: str, *, packs: bool) -> str | None:
        where = (place, torch.float32) if name in ANYWHERE else run
        if where not in specimens:
            specimens[where] = prepare(model, *where)
        return find_fault(specimens[where], Choice(name, packs, specimens[where].longest))

    try:
        for name in [] if ties else names:
            seen = fault(name, packs=True)
            if seen is None:
                return Choice(name, reason="; ".join(reasons))
            reasons.append(f"{name} over packs {seen}")
        name = names[-1]
        seen = fault(name, packs=False)
    except ValueError as error:  # of prepare
        return Choice(names[-1], packs=False, reason=f"not tested: {error}")
    if seen is not None and name != attention.default(model):
        raise ValueError(
            f"model.attention must be one that computes what {type(model).__name__} does, got "
            f"{name}, which {seen}: leave it out, or set it to {attention.default(model)}"
        )
    return Choice(name, packs=False, reason="; ".join(reasons))


def prepare(model: Any, device: torch.device, dtype: torch.dtype) -> Specimen:
    """Build a model's miniature and run its own attention on each sequence alone.

    Raises: ValueError where no miniature can be built.
    """
    longest = rotary.longest(model.config.get_text_config())
    lengths = LENGTHS if longest is None else SHORT
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(0)
        small = miniature(model, device, dtype)
        body = backbone(small)
        tokens = min(VOCABULARY, small.get_input_embeddings().weight.shape[0])
        ids = [torch.randint(1, tokens, (1, n), device=device) for n in lengths]
        alone = [body(input_ids=x, use_cache=False).last_hidden_state[0] for x in ids]
    return Specimen(small, ids, alone, longest)


@torch.no_grad()
def find_fault(specimen: Specimen, choice: Choice) -> str | None:
    """Say what is wrong with a choice of attention; None: nothing.

    Its sequences must be those of the model's own attention, and stay the same to the bit when the
    one between them changes.
    """
    lengths = [x.shape[1] for x in specimen.ids]
    try:
        specimen.model.set_attn_implementation(str(choice.attention))
        wrapped = HeadedModel(specimen.model, compute_dtype=specimen.model.dtype)
        wrapped.choice = choice
        first, other, last = _run(wrapped, specimen.ids)
        before, _, after = _run(
            wrapped, [specimen.ids[0], specimen.ids[1].flip(1), specimen.ids[2]]
        )
    except Exception as error:  # what a model's code raises over packs is up to it
        return f"raises {type(error).__name__}: {error}"
    for ours, theirs, n in zip((first, other, last), specimen.alone, lengths, strict=True):
        share = ((ours - theirs).float().square().mean() / theirs.float().square().mean()).sqrt()
        if not share <= TOLERANCE[specimen.model.dtype]:
            return f"differs by {share:.1e} of the RMS from the model's own on {n} tokens"
    if not (torch.equal(first, before) and torch.equal(last, after)):
        return "lets one sequence change another"
    return None


def _run(wrapped: HeadedModel, ids: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute the hidden states [T, H] of each sequence of one pack."""
    lengths = [x.shape[1] for x in ids]
    positions = [torch.arange(n, device=x.device)[None] for n, x in zip(lengths, ids, strict=True)]
    states = wrapped.hidden(torch.cat(ids, dim=1), torch.cat(positions, dim=1), None, lengths)
    return states.split(lengths)
