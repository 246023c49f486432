"""Estimates quantiles of many numbers by a histogram of fixed intervals.

Its counts add up exactly over micro-batches and ranks, in any order. The intervals are uniform in
asinh(x / SCALE): WIDTH · SCALE = 1e-4 wide at x = 0, WIDTH = 1% of |x| far from it. The middle one
is centred at 0; the outermost, from |x| = 110 on, take the rest.
"""

import torch
from torch import Tensor

EDGES = (-10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Edges of the intervals of teacher_log_ratio_counts, nats; the outermost take the rest."""
LENGTH_INTERVALS = 16
"""Number of equal intervals of (0, max_new_tokens] in response_length_counts."""
SIZE = 2001
"""Number of intervals of a histogram."""
WIDTH = 0.01
SCALE = 0.01
PERCENTILES = (10, 50, 90, 99)


def histogram(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """Count the values [N] float64 in each interval: [SIZE] float64.

    A NaN counts as 0, since it belongs to no interval: the sum of the values shows it.

    counted: [N] bool, which values count; None: all. Taking them out would wait for a GPU.
    """
    reach = SIZE // 2
    place = ((values / SCALE).asinh() / WIDTH).nan_to_num(nan=0.0)
    index = place.round().clamp(-reach, reach).long() + reach
    counts = torch.zeros(SIZE, dtype=torch.float64, device=values.device)
    once = torch.ones_like(values) if counted is None else counted.to(values.dtype)
    return counts.index_add(0, index, once)


def quantiles(counts: Tensor) -> list[float]:
    """Estimate the quantiles PERCENTILES from counts [SIZE] of at least one number.

    Each is the middle of the interval in which the smallest number lies that so many percent of the
    numbers do not exceed.
    """
    up_to = counts.cpu().cumsum(0)
    ranks = torch.tensor(PERCENTILES, dtype=torch.float64) / 100 * up_to[-1]
    places = torch.searchsorted(up_to, ranks) - SIZE // 2
    return ((places.double() * WIDTH).sinh() * SCALE).tolist()


def coarse(counts: Tensor) -> list[int]:
    """Add up counts [SIZE] to those of the len(EDGES) + 1 intervals of EDGES, few enough for a log.

    A fine interval, 1% wide, counts where its middle lies.
    """
    middles = ((torch.arange(SIZE, dtype=torch.float64) - SIZE // 2) * WIDTH).sinh() * SCALE
    places = torch.bucketize(middles, torch.tensor(EDGES, dtype=torch.float64))
    totals = torch.zeros(len(EDGES) + 1, dtype=torch.float64)
    return totals.index_add(0, places, counts.cpu()).long().tolist()


def length_counts(lengths_R: Tensor, most: int) -> list[int]:
    """Count lengths [R], in tokens, in LENGTH_INTERVALS equal intervals of (0, most].

    The last one holds the completions that were cut at `most`.
    """
    places = ((lengths_R - 1) * LENGTH_INTERVALS // most).clamp(0, LENGTH_INTERVALS - 1)
    return torch.bincount(places, minlength=LENGTH_INTERVALS).tolist()
