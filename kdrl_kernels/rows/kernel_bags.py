"""Adds up bags of weighted rows of a table on Triton: the products of a sparse gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl_kernels.rows.kernel_math import OPTIONS

BLOCK_H = 512
"""Columns of the table that a program adds up."""
ENTRIES = 8
"""Entries whose rows are loaded together, so that their loads are in flight together."""


@triton.jit
def _bags_kernel(
    table_ptr, index_ptr, weight_ptr, offset_ptr, out_ptr, stride_table, stride_out, H,
    ENTRIES: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[bag] = sum of weight[k] · table[index[k]] over the k of the bag, in float32."""
    bag = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first, last = tl.load(offset_ptr + bag), tl.load(offset_ptr + bag + 1)
    total = tl.zeros((ENTRIES, BLOCK_H), tl.float32)  # added up after the loop: no barrier in it
    for start in range(first, last, ENTRIES):
        k = start + tl.arange(0, ENTRIES)
        row = tl.load(index_ptr + k, mask=k < last, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + k, mask=k < last, other=0.0)
        place = row[:, None] * stride_table + h[None, :]
        values = tl.load(table_ptr + place, mask=(k < last)[:, None] & (h < H)[None, :], other=0.0)
        total += values.to(tl.float32) * weight[:, None]
    tl.store(out_ptr + bag * stride_out + h, tl.sum(total, axis=0), mask=h < H)


def bags(
    table: Tensor, index: Tensor, weights: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """Do what sparse_rows.bags does: return [bags, H] in dtype, each row written once."""
    table = table if table.stride(-1) == 1 else table.contiguous()
    out = table.new_empty(len(offsets) - 1, table.shape[1], dtype=dtype)
    if out.numel():
        grid = len(out), triton.cdiv(table.shape[1], BLOCK_H)
        _bags_kernel[grid](
            table, index, weights, offsets, out, table.stride(0), out.stride(0), table.shape[1],
            ENTRIES, BLOCK_H, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out
