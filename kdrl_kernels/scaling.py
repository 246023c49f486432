"""Multiplies sums of gradients with one number, which is on the device."""

import torch
from torch import Tensor

from kdrl_kernels.plain import has_values


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, impl: str = "torch") -> Tensor:
    """Return gradient · scale, rounded once to dtype; scale is 0-d."""
    if impl == "triton" and gradient.is_contiguous():
        from kdrl_kernels.rows import kernel_scale  # noqa: PLC0415 (Triton is optional)

        return kernel_scale.scaled(gradient, scale, dtype)
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, scale, out=out)


def scale_(gradient: Tensor, scale: Tensor, impl: str = "torch") -> Tensor:
    """Multiply gradient with scale in place, without a pass over its memory where scale is 1.

    In PyTorch that holds on a CPU alone: on a GPU the host would wait for the value of scale.
    """
    if impl == "triton" and gradient.is_contiguous():
        from kdrl_kernels.rows import kernel_scale  # noqa: PLC0415

        return kernel_scale.scale(gradient, scale, gradient)
    if scale.device.type == "cpu" and has_values(scale) and bool(scale == 1):
        return gradient
    return gradient.mul_(scale)


def scaled_(gradient: Tensor, scale: Tensor, dtype: torch.dtype, impl: str = "torch") -> Tensor:
    """Return gradient · scale in dtype, in place where the dtype is already right."""
    if gradient.dtype == dtype:
        return scale_(gradient, scale, impl)
    return scaled(gradient, scale, dtype, impl)
