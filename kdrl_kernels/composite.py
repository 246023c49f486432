"""Combines several teachers of one tokenizer into one head, by concatenation.

log q_i is linear in the logits, up to a constant of the row. So a weighted sum of log q_i is that
of one head, whose hidden states and weights are the teachers', side by side:

    sum_i w_i log q_i = [w_1/T_1 x_1, w_2/T_2 x_2, ...] · [W_1, W_2, ...]ᵀ + const
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdrl_kernels.head import TeacherHead, check_device, gathered, spare_columns
from kdrl_kernels.plain import check_number


def composite_teacher(
    heads: Sequence[TeacherHead], weights: Sequence[float], *, reuse: TeacherHead | None = None
) -> TeacherHead:
    """Return the teacher with log q = sum_i weights[i] · log q_i + const of the row, normalised.

    weights (lambda, 1 - lambda) with lambda > 1 extrapolate from the second teacher through the
    first (ExOPD); n weights of 1 / n give the geometric mean of n teachers.

    Args:
        heads: teachers of one tokenizer, with the same rows: hidden [N, H_i] or [B, T, H_i], and
            weight [V_i, H_i], each of one dtype, on one device. Where the V_i differ, rows
            beyond the smallest are cut. Temperatures (float or [N]) and biases may differ; a bias
            of -inf in any head forbids a token in all. None may have a softcap.
        weights: one finite number for each head, of either sign; their sum need not be 1.
        reuse: what an earlier call returned for heads of the same weights and biases. Its weight is
            taken as it is, and the heads' are not read: pass new hidden states, temperatures or
            numbers in `weights` at each step, and concatenate once.
    Returns: TeacherHead with temperature 1, for every argument that takes one. Hidden states times
        w_i / T_i and biases are rounded once to the dtype of hidden and of weight. A temperature of
        a row that is not positive makes its hidden states NaN. With a vocab_group, each rank
        combines its rows of all weights.
    Raises: ValueError for a number, shape, device or softcap; TypeError for a type or dtype.
    Memory: V · (H_1 + H_2 + ...) elements once, beside the heads, which may then hold its columns,
        reuse.weight[:, :H_1] and so on, in the place of weights of their own; N · (H_1 + H_2 + ...)
        a call. Its logits cost what those of one teacher of this hidden size do.
    Source: W. Yang et al., "Learning beyond Teacher: Generalized On-Policy Distillation with Reward
        Extrapolation", arXiv:2602.12125; T. Heskes, "Selecting Weighting Factors in Logarithmic
        Opinion Pools", NIPS 1997.
    """
    for name, value in (("heads", heads), ("weights", weights)):
        if not isinstance(value, Sequence):
            what = "TeacherHeads" if name == "heads" else "numbers"
            remedy = ": take .tolist()" if hasattr(value, "tolist") else ""
            raise TypeError(
                f"{name} must be a list or tuple of {what}, got {type(value).__name__}{remedy}"
            )
    heads, weights = list(heads), list(weights)
    _check(heads, weights)
    parts = [_scaled(head, head.hidden, w) for head, w in zip(heads, weights, strict=True)]
    with_bias = [pair for pair in zip(heads, weights, strict=True) if pair[0].bias is not None]
    if with_bias:
        ones = torch.ones_like(heads[0].hidden[..., :1])
        parts += [_scaled(head, ones, w) for head, w in with_bias]
        parts += [torch.zeros_like(ones)] * spare_columns(len(with_bias))
    hidden = torch.cat(parts, dim=-1)
    if reuse is None:
        return TeacherHead(hidden, *_side_by_side(heads))
    V = min(len(head.weight) for head in heads)
    if not isinstance(reuse, TeacherHead):
        raise TypeError(f"reuse must be a TeacherHead or None, got {type(reuse).__name__}")
    if reuse.weight.shape != (V, hidden.shape[-1]) or (reuse.bias is None) == bool(with_bias):
        raise ValueError(
            f"reuse must be a composite of these heads, with weight {[V, hidden.shape[-1]]} and "
            f"{'a' if with_bias else 'no'} bias, got weight {list(reuse.weight.shape)} and "
            f"{'no' if reuse.bias is None else 'a'} bias"
        )
    return TeacherHead(hidden, reuse.weight, reuse.bias)


def _scaled(head: TeacherHead, hidden: Tensor, weight: float) -> Tensor:
    """Return hidden · weight / temperature of the head, rounded once."""
    temperature = head.temperature
    if not isinstance(temperature, Tensor):
        return hidden * (weight / temperature)
    wide = temperature.detach().to(torch.promote_types(hidden.dtype, torch.float32))
    factor = torch.where(wide > 0, weight / wide, torch.nan)
    return (hidden * factor[..., None]).to(hidden.dtype)


def _side_by_side(heads: list[TeacherHead]) -> tuple[Tensor, Tensor | None]:
    """Return the weights and finite biases as columns [V, H], and what forbids tokens, [V].

    A bias is a column, since w_i / T_i, which multiplies it, may differ from row to row. Its -inf
    stays a bias: a negative weight would make it +inf, and 0 NaN.
    """
    V = min(len(head.weight) for head in heads)
    columns = [gathered(head.weight, head.hidden)[:V] for head in heads]
    biases = [
        gathered(head.bias, head.hidden)[:V].to(columns[0].dtype)
        for head in heads
        if head.bias is not None
    ]
    if not biases:
        return torch.cat(columns, dim=1), None
    bias = torch.stack(biases, dim=1)
    forbidden = (bias == -torch.inf).any(dim=1)
    columns.append(bias.masked_fill(bias == -torch.inf, 0))
    columns.append(bias.new_zeros(V, spare_columns(len(biases))))
    return torch.cat(columns, dim=1), bias.new_zeros(V).masked_fill(forbidden, -torch.inf)


def _check(heads: list[TeacherHead], weights: list[float]) -> None:
    """Raise unless heads and weights go together; each head has passed its own checks."""
    if not heads or len(weights) != len(heads):
        raise ValueError(
            f"weights must be one number for each of one or more heads, got {len(weights)} for "
            f"{len(heads)} heads"
        )
    for i, (head, weight) in enumerate(zip(heads, weights, strict=True)):
        if not isinstance(head, TeacherHead):
            raise TypeError(f"heads[{i}] must be a TeacherHead, got {type(head).__name__}")
        check_number(f"weights[{i}]", weight)
        if not math.isfinite(weight):
            raise ValueError(f"weights[{i}] must be finite, got {weight}")
        if head.softcap is not None:
            raise ValueError(
                f"heads[{i}].softcap must be None, got {head.softcap}: capped logits are not "
                "linear in the hidden states, so no concatenation gives their sum"
            )
        first = heads[0]
        if head.hidden.shape[:-1] != first.hidden.shape[:-1]:
            raise ValueError(
                f"heads[{i}].hidden must have the rows of heads[0].hidden "
                f"{list(first.hidden.shape[:-1])}, got {list(head.hidden.shape)}"
            )
        for name in ("hidden", "weight"):
            tensor, other = getattr(head, name), getattr(first, name)
            if tensor.dtype != other.dtype:
                raise TypeError(
                    f"heads[{i}].{name} must have the dtype of heads[0].{name} ({other.dtype}), "
                    f"got {tensor.dtype}"
                )
        check_device(f"heads[{i}].hidden", head.hidden, "heads[0].hidden", first.hidden)
