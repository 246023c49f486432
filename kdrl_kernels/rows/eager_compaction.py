"""Decides which rows of a chunk have a gradient, and where each goes, in PyTorch: README.md."""

import torch
from torch import Tensor

from kdrl_kernels.token_rows import Coefficients


def slots(coef: Coefficients) -> tuple[Tensor, Tensor]:
    """Return which row goes into each slot, [C] int64, and the number n of used rows, 0-d int64.

    Slot s < n gets row s if that is used; the others get, in order, the used rows from n on.
    Slots from n on get -1: none.
    """
    used = coef.used()
    n = torch.arange(len(used), device=used.device)
    count = used.sum()
    holes = ~used & (n < count)
    movers = torch.where(used & (n >= count), n, len(used)).sort().values
    source = torch.where(holes, movers[(holes.cumsum(0) - 1).clamp_min(0)], n)
    return torch.where(n < count, source, -1), count
