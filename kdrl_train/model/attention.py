"""Attention over a pack: its cost grows with its sequences' lengths, not with the pack's length.

A pack is several sequences in one row of T tokens. transformers' own SDPA masks it with [T, T]
numbers. Here the sequences are kept apart by their lengths: on a GPU in 16 bit by PyTorch's
variable-length kernel; elsewhere they go into batches of similar length, padded on the right, where
causal attention needs no mask. It is registered with transformers as "packed"; without packed
lengths it is SDPA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from kdrl_train.copies import to_device

NAME = "packed"
FLASH = "flash_attention_2"
VARLEN_DTYPES = (torch.float16, torch.bfloat16)
GROUPED = "enable_gqa" in signature(varlen.varlen_attn).parameters
"""Whether the variable-length kernel reads one key for several query heads, as newer ones do."""

HARMLESS = frozenset(
    {
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids"),
        *("cache_position", "past_key_values", "use_cache", "logits_to_keep", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "deterministic"),
    }
)
"""Arguments that a model may hand to its attention and that change nothing in its result."""


def preferred(model: Any, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Name the attentions that a transformers model may have, the best first, its own last.

    FlashAttention needs 16 bit on a GPU; ours a model whose code passes arguments on.

    Args:
        dtype: the compute dtype.
    """
    half = device.type == "cuda" and dtype in VARLEN_DTYPES
    flash = half and model._supports_flash_attn and is_flash_attn_2_available()
    ours = model._supports_sdpa and model._supports_attention_backend
    return [*[FLASH] * flash, *[NAME] * ours, default(model)]


def default(model: Any) -> str:
    """Name the attention that transformers chooses for a model."""
    return "sdpa" if model._supports_sdpa else "eager"


@dataclass(frozen=True, slots=True)
class Choice:
    """How a model computes the sequences of a pack; choice.py chooses."""

    attention: str | None = None
    """Name of the attention in transformers; None: whichever the model has."""
    packs: bool = True
    """Whether a row may hold several sequences."""
    longest: int | None = None
    """Tokens of the longest sequence that may share a row; None: of any length."""
    reason: str = ""
    """Why it is not the best attention over packs; empty where it is."""

    def share(self, lengths: Sequence[int]) -> bool:
        """Say whether sequences of these lengths may share a row."""
        fits = self.longest is None or max(lengths) <= self.longest
        return len(lengths) == 1 or (self.packs and fits)

    def __str__(self) -> str:
        rows = "packs keep their sequences apart" if self.packs else "one sequence a row"
        if self.packs and self.longest is not None:
            rows += f" up to {self.longest:,} tokens, a longer one has a row alone"
        return f"{self.attention} attention, {rows}" + (f"; {self.reason}" if self.reason else "")


def packed_arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return the arguments that tell a model's attention the lengths of a pack's sequences.

    The mask is a placeholder: transformers passes it on unchanged, and `attention` only looks
    whether it is still this one.
    """
    return {
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device),
        "packed_lengths": tuple(lengths),
        **flash_arguments(lengths, device),
    }


def flash_arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return the arguments that tell FlashAttention the lengths of a pack's sequences.

    Without them transformers reads these from the positions, in every layer, and the host waits for
    the device each time.
    """
    ends = to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed_lengths: Sequence[int] | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Map query [1, heads, T, D], key and value [1, heads_kv, T, D] to [1, T, heads, D].

    sliding_window: how many tokens a query sees, itself included; None: all before it.

    Raises: ValueError for an argument that would be left out: the model computes something else.
    """
    if packed_lengths is None:  # the mask holds the window
        if attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:
            raise ValueError(
                f"{NAME} attention must get the lengths of a pack, got none: the model's code does "
                "not hand them on; leave model.attention out, or set it to sdpa"
            )
        _refuse(more, HARMLESS | {"is_causal", "position_bias"})  # which SDPA reads
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    causal = more.pop("is_causal", None)
    if dropout or not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(f"{NAME} attention must be causal and have dropout 0, got {dropout}")
    _refuse(more, HARMLESS)
    if attention_mask is not None and attention_mask.numel() > 1:
        raise ValueError(
            f"{NAME} attention must have no mask of the model's own, got one of "
            f"{tuple(attention_mask.shape)}: leave model.attention out, or set it to eager"
        )
    window = sliding_window if sliding_window and sliding_window < max(packed_lengths) else None
    if not (GROUPED and _has_varlen(query)):
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    heads = [x[0] for x in (query, key, value)]
    if torch.is_autocast_enabled(query.device.type):  # rotary leaves float32 behind
        heads = [x.to(torch.get_autocast_dtype(query.device.type)) for x in heads]
    if _has_varlen(heads[0]):
        out = _varlen(heads, packed_lengths, more["cu_seq_lens_q"], scaling, window)
    else:
        out = _padded(heads, packed_lengths, scaling, window).transpose(0, 1)
    return out[None].contiguous(), None  # AFMoE takes a view of it


def _refuse(more: dict[str, Any], harmless: frozenset[str]) -> None:
    """Raise ValueError for an argument that says more than which tokens share a sequence.

    Such are capped scores (softcap), sinks (s_aux, sinks), a choice of keys (indices,
    block_indices), a bias of positions, and whatever a later transformers adds.
    """
    others = sorted({name for name, value in more.items() if value is not None} - harmless)
    if others:
        raise ValueError(
            f"{NAME} attention must get queries, keys, values, a scale and a window alone, got "
            f"{', '.join(others)} too: leave model.attention out, or set it to eager"
        )


def _has_varlen(query: Tensor) -> bool:
    """Say whether PyTorch's variable-length kernel takes such a query, cast by autocast."""
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    return query.device.type == "cuda" and dtype in VARLEN_DTYPES


def _varlen(
    heads: list[Tensor],
    lengths: Sequence[int],
    ends: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Map the heads of query, key and value, each [heads, T, D], to [T, heads, D] in one kernel.

    With GROUPED there may be fewer heads of keys and values.
    """
    query, key, value = (x.transpose(0, 1) for x in heads)
    grouped: dict[str, Any] = {"enable_gqa": True} if key.shape[1] < query.shape[1] else {}
    longest = max(lengths)
    out = varlen.varlen_attn(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(out, Tensor)  # it returns a pair only with return_aux
    return out


def _padded(
    heads: list[Tensor], lengths: Sequence[int], scaling: float | None, window: int | None
) -> Tensor:
    """Map the heads of query, key and value, each [heads, T, D], to [heads, T, D].

    The sequences go into batches whose lengths differ by less than a factor of 2.
    """
    batches, places = _batches(tuple(lengths), heads[0].device)
    outputs = []
    for index in batches:
        rows = (x.index_select(1, index.flatten()).unflatten(1, index.shape) for x in heads)
        query, key, value = (x.transpose(0, 1) for x in rows)  # [B, heads, ., D]
        mask = None if window is None else _band(index.shape[1], window, index.device)
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        outputs.append(out.transpose(0, 1).flatten(1, 2))
    return torch.cat(outputs, dim=1).index_select(1, places)


@lru_cache(maxsize=4)  # all layers of a model read the same pack
def _batches(lengths: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Divide the sequences of a pack into batches, padded on the right.

    Returns: for each batch [B, L] places in the pack; [T], where each token of the pack is among
        those of all batches, one after the other.
    """
    starts = torch.tensor([0, *accumulate(lengths)])
    members_of: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        members_of.setdefault(length.bit_length(), []).append(i)
    places, batches, before = torch.empty(sum(lengths), dtype=torch.int64), [], 0
    for members in members_of.values():
        L, first = max(lengths[i] for i in members), starts[members]
        index = first[:, None] + torch.arange(L)
        inside = torch.arange(L) < torch.tensor(lengths)[members, None]
        places[index[inside]] = inside.flatten().nonzero()[:, 0] + before
        batches.append(to_device(index.where(inside, first[0]), device))
        before += index.numel()
    return batches, to_device(places, device)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Return the [length, length] bool mask where a token sees itself and window - 1 before it."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
