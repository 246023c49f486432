"""Computes the means of a study over seeds and problems, and their 95% intervals.

S seeds (runs of an arm), P problems (the same ones in every run), D draws.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import optimize, stats

DRAWS = 4000
ENDS = (0.025, 0.975)
"""Probabilities below the two ends of an interval."""


@dataclass(frozen=True, slots=True)
class MeanOverSeeds:
    """A mean over seeds and problems, with its 95% interval."""

    mean: float
    low: float
    high: float
    seeds: int = 1
    """Number of runs, or of pairs of runs, in the mean. For one run the interval is over problems
    alone and says nothing about another run."""

    @property
    def sign(self) -> int:
        """Return 1 or -1 where the interval lies on one side of 0, else 0."""
        return (self.low > 0) - (self.high < 0)


def mean_over_seeds(scores_SP: np.ndarray, draws: int = DRAWS) -> MeanOverSeeds:
    """Compute the mean over seeds and problems, and its 95% interval.

    Seeds and problems are both samples: another study of the same models and settings would draw
    others. The problems are drawn with return (bootstrap). Three seeds are too few to draw from:
    the most extreme draws would be the seeds themselves, and all three lie on one side of the
    truth in a quarter of all cases. So a draw of problems moves by Student's t with S - 1 degrees
    of freedom, times the standard error over seeds, and the ends of the interval are quantiles of
    this sum of two random numbers. The draws are the same for every call with this P.

    Args:
        scores_SP: [S, P] float, S and P at least 1. For a paired difference of two arms it holds
            their difference: same seed and same problem in the same place.
    """
    S, P = scores_SP.shape
    means_D = _counts(P, draws) @ scores_SP.mean(axis=0) / P
    low, high = np.quantile(means_D, ENDS)
    if S > 1 and (error := float(scores_SP.mean(axis=1).std(ddof=1)) / math.sqrt(S)):
        low, high = (_moved_quantile(means_D, error, S - 1, share) for share in ENDS)
    return MeanOverSeeds(float(scores_SP.mean()), float(low), float(high), S)


@lru_cache(maxsize=4)
def _counts(n: int, draws: int) -> np.ndarray:
    """Count how often each of n problems is in a sample of n with return: [draws, n]."""
    rng = np.random.default_rng(n)
    return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)


def _moved_quantile(means_D: np.ndarray, error: float, freedom: int, share: float) -> float:
    """Return the quantile of m + error · t, m drawn from means_D and t from Student's t.

    Its distribution function is the mean over the draws of that of t, which is inverted here.
    """
    quantile = error * stats.t.ppf(share, freedom)
    margin = error + 1e-9  # the draws may all be equal, and the error no more than rounding
    return optimize.brentq(
        lambda x: stats.t.cdf((x - means_D) / error, freedom).mean() - share,
        means_D.min() + quantile - margin,
        means_D.max() + quantile + margin,
    )


def smooth(values: list[float], window: int) -> list[float]:
    """Average each value with the `window` - 1 values before it (fewer at the start)."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return [float(x) for x in (sums[ends] - sums[starts]) / (ends - starts)]


def first_reached(values: list[float], level: float) -> int | None:
    """Return the index of the first value at or above `level`; None where none reaches it."""
    return next((i for i, value in enumerate(values) if value >= level), None)
