"""Picks the K largest logits of each row, in PyTorch for every implementation.

`topk` does not say which of equal values it takes. Here it is the lowest column, so that two runs,
two devices and two ways to cut chunks pick the same.
"""

import math

import torch
from torch import Tensor

from kdrl_kernels.rows.blocks import row_blocks

VECTOR = 32
"""Neighbours whose maximum a CPU finds as fast as it reads: a group is a multiple of this."""


def best_columns(logits: Tensor, K: int) -> Tensor:
    """Return the columns of the K largest logits [C, V] of each row, [C, K], largest first.

    Of equal ones the lowest column comes first. A column of -inf gives -1.
    """
    return torch.cat([_best_of(logits[rows], K) for rows in row_blocks(len(logits), logits)])


def _best_of(logits: Tensor, K: int) -> Tensor:
    """Return best_columns of a block of rows.

    They lie in the K groups of neighbours whose maxima are the largest: only these are searched.
    With groups of about (V / K)^½ columns that is 2 (V K)^½ values, where a row has V.
    """
    V = logits.shape[1]
    size = -(-math.isqrt(V // K) // VECTOR) * VECTOR
    if size * K >= V:
        columns = _largest(logits, K)
    else:
        full = V // size
        maxima = logits[:, : full * size].unflatten(1, (full, size)).amax(dim=2)
        if full * size < V:
            last = logits[:, full * size :].amax(dim=1, keepdim=True)
            maxima = torch.cat([maxima, last], dim=1)
        within = torch.arange(size, device=logits.device)
        columns = (_largest(maxima, K)[:, :, None] * size + within).flatten(1)
        beyond = columns >= V
        columns.clamp_(max=V - 1)  # so that a row of NaN too names columns that exist
        values = logits.gather(1, columns).masked_fill_(beyond, -math.inf)
        columns = columns.gather(1, _largest(values, K))
    values = logits.gather(1, columns)
    order = values.sort(dim=1, descending=True, stable=True).indices
    return columns.masked_fill(values == -math.inf, -1).gather(1, order)


def _largest(values: Tensor, K: int) -> Tensor:
    """Return the places of the K largest values of each row, in ascending order.

    Of values equal to the smallest of them, the first places count.
    """
    n = values.shape[1]
    bound = values.topk(K, dim=1).values[:, -1:]
    first = torch.arange(n, 0, -1, device=values.device)
    key = torch.where(values > bound, first + n, torch.where(values == bound, first, 0))
    return key.topk(K, dim=1).indices.sort(dim=1).values
