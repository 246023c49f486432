"""Runs the three GEMMs of a chunk, accumulated in float32 (float64 for float64 operands).

On a GPU, 16-bit operands go to cuBLAS with a float32 result. A CPU has no such GEMM:
16-bit weights are widened a block of columns at a time, which gives the same products and sums.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

WIDEN_ELEMENTS = 1 << 22
"""Elements of weight and dz widened at a time on a CPU: 16 MB of float32."""


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """Compute out [C, V] = hidden [C, H] · weight [V, H]ᵀ, one rounding, to the dtype of out."""
    if _native(hidden, out):
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for cols in _blocks(weight, len(hidden)):
            torch.mm(wide, weight[cols].to(out.dtype).T, out=out[:, cols])


def grad_hidden(dz: Tensor, weight: Tensor, out: Tensor) -> None:
    """Compute out [C, H] = dz [C, V] · weight [V, H]; dz and weight in one dtype."""
    if _native(dz, out):
        torch.mm(dz, weight, out=out)
    elif dz.is_cuda:
        torch.mm(dz, weight, out_dtype=out.dtype, out=out)
    else:
        out.zero_()
        for cols in _blocks(weight, len(dz)):
            out.addmm_(dz[:, cols].to(out.dtype), weight[cols].to(out.dtype))


def add_grad_weight(dz: Tensor, hidden: Tensor, out: Tensor, *, first: bool = False) -> None:
    """Add dz [C, V]ᵀ · hidden [C, H] to out [V, H], or overwrite it where first; one dtype."""
    if dz.is_cuda and not _native(dz, out):
        if first:
            torch.mm(dz.T, hidden, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, dz.T, hidden, out_dtype=out.dtype, out=out)
        return
    wide = hidden.to(out.dtype)
    for cols in [slice(None)] if _native(dz, out) else _blocks(out, len(dz)):
        part = dz[:, cols].to(out.dtype).T
        if first:
            torch.mm(part, wide, out=out[cols])
        else:
            out[cols].addmm_(part, wide)


def _native(operand: Tensor, out: Tensor) -> bool:
    return operand.dtype == out.dtype


def _blocks(weight: Tensor, rows: int) -> Iterator[slice]:
    """Yield blocks of vocabulary columns, small enough to widen their weight and dz at once."""
    step = max(1, WIDEN_ELEMENTS // (weight.shape[1] + rows))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)
