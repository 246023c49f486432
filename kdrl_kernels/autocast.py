"""Keeps autocast out: everything is computed in the dtypes of its own tensors."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Compute in the tensors' own dtypes, whatever autocast says, and launch on their own GPU."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    has_autocast = torch.amp.is_autocast_available(device.type)  # meta tensors have none
    off = torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()
    with on_device, off:
        yield


class Project(torch.autograd.Function):
    """Computes left [M, K] · right [N, K]ᵀ, as often differentiable as wanted.

    Autograd runs a backward pass under the autocast of its caller, which would round the operands
    of this product's derivatives to 16 bits.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        with without_autocast(left.device):
            return left @ right.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        needs_left, needs_right = ctx.needs_input_grad
        return (
            Project.apply(grad, right.T) if needs_left else None,
            Project.apply(grad.T, left.T) if needs_right else None,
        )
