"""Quantiles of many numbers by a histogram of fixed bins, which adds up exactly, over micro-batches
and ranks, in any order.

Bins are uniform in asinh(x / SCALE): WIDTH · SCALE = 1e-4 wide at x = 0, WIDTH = 1% of |x| far from
it. The middle one is centred at 0; the outermost, from |x| = 110 on, take the rest.
"""

import torch
from torch import Tensor

EDGES = (-10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Between the bins of teacher_log_ratio_counts, nats; the outermost bins take the rest."""

LENGTH_BINS = 16
"""Equal bins of (0, max_new_tokens] of response_length_counts."""
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


def coarse(counts: Tensor) -> list[int]:
    """Counts [BINS] -> those of the len(EDGES) + 1 bins between EDGES, few enough for a log; a fine
    bin, 1% wide, counts where its middle lies."""
    middles = ((torch.arange(BINS, dtype=torch.float64) - BINS // 2) * WIDTH).sinh() * SCALE
    places = torch.bucketize(middles, torch.tensor(EDGES, dtype=torch.float64))
    totals = torch.zeros(len(EDGES) + 1, dtype=torch.float64)
    return totals.index_add(0, places, counts.cpu()).long().tolist()


def length_counts(lengths_R: Tensor, most: int) -> list[int]:
    """[R] tokens -> counts of LENGTH_BINS equal bins of (0, most]; the last one holds what was cut
    at `most`."""
    places = ((lengths_R - 1) * LENGTH_BINS // most).clamp(0, LENGTH_BINS - 1)
    return torch.bincount(places, minlength=LENGTH_BINS).tolist()
