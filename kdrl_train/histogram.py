"""Quantiles of many numbers by a histogram of fixed bins, which adds up exactly, over micro-batches
and ranks, in any order.

Bins are uniform in asinh(x / SCALE): WIDTH · SCALE = 1e-4 wide at x = 0, WIDTH = 1% of |x| far from
it. The middle one is centred at 0; the outermost, from |x| = 110 on, take the rest.
"""

import torch
from torch import Tensor

BINS = 2001
WIDTH = 0.01
SCALE = 0.01
PERCENTILES = (10, 50, 90, 99)


def histogram(values: Tensor) -> Tensor:
    """[N] float64 -> [BINS] counts, float64. A NaN counts as 0, since no bin would do: whoever
    needs to know of it looks at the sum."""
    reach = BINS // 2
    place = ((values / SCALE).asinh() / WIDTH).nan_to_num(nan=0.0)
    index = place.round().clamp(-reach, reach).long() + reach
    counts = torch.zeros(BINS, dtype=torch.float64, device=values.device)
    return counts.index_add(0, index, torch.ones_like(values))


def quantiles(counts: Tensor) -> list[float]:
    """Counts [BINS] of at least one number -> for each of PERCENTILES the middle of the bin in
    which the smallest number lies that so many percent do not exceed."""
    up_to = counts.cpu().cumsum(0)
    ranks = torch.tensor(PERCENTILES, dtype=torch.float64) / 100 * up_to[-1]
    places = torch.searchsorted(up_to, ranks) - BINS // 2
    return ((places.double() * WIDTH).sinh() * SCALE).tolist()
