"""Multiplies a gradient with one number on Triton, rounded once. Bytes: COST.md."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl_kernels.rows.kernel_math import OPTIONS

BLOCK = 4096
"""Elements of one step: eight 16-byte loads of float32 a thread are in flight."""
WARPS = 4
PROGRAMS = 2048
"""The most programs, about two waves of an H100: where nothing is to do, all end at once."""


@triton.jit
def _scale_kernel(
    x_ptr, scale_ptr, out_ptr, size, programs,
    IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = x[i] · scale in float32; in place, a scale of 1 reads and writes no element."""
    scale = tl.load(scale_ptr).to(tl.float32)
    end = size
    if IN_PLACE:
        end = tl.where(scale == 1.0, 0, size)  # NaN is not 1; masks need size, a multiple of 16
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, end, programs * BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + i, (x * scale).to(out_ptr.dtype.element_ty), mask=i < size)


def scale(
    x: Tensor, factor: Tensor, out: Tensor, *, block: int = BLOCK, most: int = PROGRAMS
) -> Tensor:
    """Write x · factor into out, both contiguous and of one size; factor is 0-d."""
    size = x.numel()
    if size:
        programs = min(most, triton.cdiv(size, block))
        in_place = out is x
        _scale_kernel[programs,](
            x, factor, out, size, programs, in_place, block, num_warps=WARPS, **OPTIONS
        )
    return out


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x · factor in dtype, rounded once; factor is 0-d."""
    return scale(x, factor, torch.empty_like(x, dtype=dtype))
