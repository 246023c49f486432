"""Puts a low-rank adapter beside a constant head: one wider head, of which few columns are trained.

hidden · weightᵀ + scale · (hidden · Aᵀ) · Bᵀ = [hidden, scale · hidden · Aᵀ] · [weight, B]ᵀ
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrl_kernels import gemm
from kdrl_kernels.autocast import without_autocast
from kdrl_kernels.chunks import accumulator
from kdrl_kernels.head import (
    FLOATS,
    StudentHead,
    check_like,
    gathered,
    needs_gradient,
    spare_columns,
)
from kdrl_kernels.plain import check_number, kind_of


@dataclass(frozen=True, slots=True)
class LowRank:
    """Holds an adapter (LoRA) of a head, which then is weight + scale · B · A.

    Args:
        A: [r, H], on the device of hidden, in its dtype; or one of the two in float32 and the other
            in 16 bits, as a weight. A DTensor (FSDP2) is gathered as a weight is.
        B: [V, r], likewise.
        scale: lora_alpha / r, or whatever factor the adapter was trained with; a constant.
    Raises: ValueError for a shape or scale; TypeError for a type or dtype.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, tensor in (("A", self.A), ("B", self.B)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} of LowRank must be a tensor, got {kind_of(tensor)}")
            if tensor.dtype not in FLOATS:
                raise TypeError(f"{name} of LowRank must be floating point, got {tensor.dtype}")
        if self.A.ndim != 2 or len(self.A) == 0:
            raise ValueError(f"A of LowRank must be [r, H] with r > 0, got {list(self.A.shape)}")
        if self.B.ndim != 2 or self.B.shape[1] != len(self.A):
            raise ValueError(
                f"B of LowRank must be [V, r] with r = {len(self.A)}, the rows of A [r, H], "
                f"got {list(self.B.shape)}: pass lora_A's weight, then lora_B's, as they are"
            )
        check_number("scale of LowRank", self.scale)
        if not math.isfinite(self.scale):
            raise ValueError(f"scale of LowRank must be finite, got {self.scale}")


def with_adapter(head: StudentHead, adapter: LowRank) -> StudentHead:
    """Return the wider head, whose gradients reach hidden, A and B alone."""
    A, B = gathered(adapter.A, head.hidden), gathered(adapter.B, head.hidden)
    spare = spare_columns(len(A))
    if spare:
        A, B = F.pad(A, (0, 0, 0, spare)), F.pad(B, (0, spare))
    hidden = _widened(head.hidden, A, float(adapter.scale))
    return replace(head, hidden=hidden, weight=B, constant=head.weight.detach())


def check_adapter(adapter: Any, head: StudentHead) -> None:
    """Raise unless adapter is None or a LowRank of this head, whose weight gets no gradient."""
    if adapter is None:
        return
    if not isinstance(adapter, LowRank):
        raise TypeError(
            f"adapter must be a LowRank or None, got {type(adapter).__name__}: pass "
            "kk.LowRank(A, B, scale)"
        )
    (V, H), tensors = head.weight.shape, {"A": adapter.A, "B": adapter.B}
    for name, tensor in tensors.items():
        check_like(f"adapter.{name}", tensor, "hidden", head.hidden)
    if adapter.A.shape[1] != H:
        raise ValueError(f"adapter.A must be [r, H] with H = {H}, got {list(adapter.A.shape)}")
    if len(adapter.B) != V:
        raise ValueError(f"adapter.B must be [V, r] with V = {V}, got {list(adapter.B.shape)}")
    if needs_gradient(head)[1]:
        raise ValueError(
            "weight must not need a gradient beside an adapter, got one that requires_grad: "
            "freeze it with weight.requires_grad_(False), or pass weight.detach()"
        )


@torch.library.custom_op("kdrl::widened", mutates_args=())
def _widened(hidden: Tensor, A: Tensor, scale: float) -> Tensor:
    """Return [hidden, scale · hidden · Aᵀ], whose product is rounded once."""
    with without_autocast(hidden.device):
        right = A.to(hidden.dtype).T
        narrow = torch.addmm(hidden.new_zeros(1), hidden, right, beta=0, alpha=scale)
        return torch.cat([hidden, narrow], dim=1)


@_widened.register_fake
def _(hidden: Tensor, A: Tensor, scale: float) -> Tensor:  # noqa: ARG001
    return hidden.new_empty(hidden.shape[0], hidden.shape[1] + A.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:  # noqa: ARG001
    hidden, A, ctx.scale = inputs
    ctx.save_for_backward(hidden, A)


@torch.library.custom_op("kdrl::widened_backward", mutates_args=())
def _widened_backward(
    grad: Tensor, hidden: Tensor, A: Tensor, scale: float, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden and A, each rounded once; empty where not needed."""
    H = hidden.shape[1]
    straight, narrow = grad[:, :H], grad[:, H:]
    dhidden, dA = hidden.new_empty(0), A.new_empty(0)
    with without_autocast(hidden.device):
        if needs[0]:
            dhidden = torch.addmm(straight, narrow, A.to(hidden.dtype), alpha=scale)
        if needs[1]:
            used = (narrow != 0).any(dim=1, keepdim=True)  # rows left out may hold NaN
            sums = A.new_empty(A.shape, dtype=accumulator(hidden.dtype))
            gemm.add_grad_weight(narrow, torch.where(used, hidden, 0), sums, first=True)
            dA = (sums * scale).to(A.dtype)
    return dhidden, dA


@_widened_backward.register_fake
def _(
    grad: Tensor,  # noqa: ARG001
    hidden: Tensor,
    A: Tensor,
    scale: float,  # noqa: ARG001
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    pairs = zip((hidden, A), needs, strict=True)
    dhidden, dA = (x.new_empty(x.shape if need else 0) for x, need in pairs)
    return dhidden, dA


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    needs = ctx.needs_input_grad[:2]
    dhidden, dA = _widened_backward(grad, *ctx.saved_tensors, ctx.scale, needs)
    return dhidden if needs[0] else None, dA if needs[1] else None, None


_widened.register_autograd(_backward, setup_context=_save)
