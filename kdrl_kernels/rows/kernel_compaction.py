"""Decides which rows of a chunk have a gradient, and where each goes, on Triton: README.md."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl_kernels.rows.kernel_math import OPTIONS
from kdrl_kernels.token_rows import Coefficients

BLOCK, WARPS = 1024, 8
"""Rows that a program looks at together, and its warps."""


@triton.jit
def _is_not_0(ptr, n, C):
    """Say of which rows n < C a derivative is not 0; NaN is not. ptr None: of none."""
    some = n < 0
    if ptr is not None:
        some = tl.load(ptr + n, mask=n < C, other=0.0) != 0
    return some


@triton.jit
def _used(a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, f_ptr, g_ptr, n, C):
    some = _is_not_0(a_ptr, n, C) | _is_not_0(b_ptr, n, C) | _is_not_0(c_ptr, n, C)
    some |= _is_not_0(d_ptr, n, C) | _is_not_0(e_ptr, n, C) | _is_not_0(f_ptr, n, C)
    return (some | _is_not_0(g_ptr, n, C)).to(tl.int32)


@triton.jit
def _count_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, f_ptr, g_ptr, total_ptr, source_ptr, hole_ptr, rank_ptr,
    C, BLOCK: tl.constexpr,
):  # fmt: skip
    """total = the number n of rows where a derivative (a to g) is not 0, and how many are below n.

    source[s] = s for s < n, else -1; hole[k] = the k-th unused row below n; rank[m] = how many used
    rows are before the used row m >= n, else -1. One program, which reads the rows twice.
    """
    count, below, seen = 0, 0, 0
    for start in range(0, C, BLOCK):
        row = start + tl.arange(0, BLOCK)
        count += tl.sum(_used(a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, f_ptr, g_ptr, row, C), axis=0)
    for start in range(0, C, BLOCK):
        row = start + tl.arange(0, BLOCK)
        used = _used(a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, f_ptr, g_ptr, row, C)
        before = seen + tl.cumsum(used, axis=0) - used
        tl.store(source_ptr + row, tl.where(row < count, row, -1), mask=row < C)
        tl.store(rank_ptr + row, tl.where((row >= count) & (used == 1), before, -1), mask=row < C)
        tl.store(hole_ptr + row - before, row, mask=(row < count) & (used == 0))
        seen += tl.sum(used, axis=0)
        below += tl.sum(tl.where(row < count, used, 0), axis=0)
    tl.store(total_ptr, count)
    tl.store(total_ptr + 1, below)


@triton.jit
def _fill_kernel(total_ptr, source_ptr, hole_ptr, rank_ptr, C, BLOCK: tl.constexpr):
    """source[hole[rank[m] - below]] = m for the rows m with a rank.

    A kernel of its own: on AMD's GPUs a barrier does not make what others wrote visible.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(rank_ptr + row, mask=row < C, other=-1)
    below = tl.load(total_ptr + 1)
    hole = tl.load(hole_ptr + rank - below, mask=rank >= 0, other=0)
    tl.store(source_ptr + hole, row, mask=rank >= 0)


def slots(coef: Coefficients, BLOCK: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Return which row goes into each slot, [C] int64, and the number n of used rows, 0-d int64.

    As the function of eager_compaction, whose 18 operators are two kernels here.
    """
    C, device = len(coef.logprobs), coef.logprobs.device
    rows = torch.empty(3, C, dtype=torch.int64, device=device)
    total = torch.zeros(2, dtype=torch.int64, device=device)
    extra = None if coef.extra is None else coef.extra.abs().amax(dim=1)
    values = coef.logprobs, coef.entropy, coef.kl, coef.forward_kl, coef.lse, coef.rest, extra
    contiguous = (None if value is None else value.contiguous() for value in values)
    if C:
        _count_kernel[(1,)](*contiguous, total, *rows, C, BLOCK, num_warps=WARPS, **OPTIONS)
        grid = (triton.cdiv(C, BLOCK),)
        _fill_kernel[grid](total, *rows, C, BLOCK, num_warps=WARPS, **OPTIONS)
    return rows[0], total[0]


__all__ = ["slots"]
