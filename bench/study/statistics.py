"""Intervals of a study: means over seeds and problems, and paired differences.

S seeds (runs of an arm), P problems (the same ones in every run), D draws.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DRAWS = 4000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float
    seeds: int = 1
    """Runs, or pairs of runs, that it is the mean of. Of one, the interval is over problems alone
    and says nothing about another run."""

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of 0, else 0."""
        return (self.low > 0) - (self.high < 0)


def estimate(scores_SP: np.ndarray, draws: int = DRAWS) -> Estimate:
    """Mean over seeds and problems, and its 95% interval.

    Both are samples: another study of the same models and settings would have others. Problems are
    drawn with return (bootstrap). Three seeds are too few to draw from, since the most extreme of
    such draws are the seeds themselves, and lie on one side of the truth a quarter of the time:
    each draw moves by Student's t with S - 1 degrees of freedom, times the standard error over
    seeds. The draws are the same for every call with these S and P.

    Args:
        scores_SP: [S, P] float, S and P at least 1; for a paired difference of two arms, their
            difference: same seed and same problem in the same place.
    """
    S, P = scores_SP.shape
    means_D = _counts(P, draws) @ scores_SP.mean(axis=0) / P
    if S > 1:
        error = float(scores_SP.mean(axis=1).std(ddof=1)) / math.sqrt(S)
        means_D = means_D + error * _students_t(S - 1, draws)
    low, high = np.quantile(means_D, (0.025, 0.975))
    return Estimate(float(scores_SP.mean()), float(low), float(high), S)


@lru_cache(maxsize=4)
def _counts(n: int, draws: int) -> np.ndarray:
    """[draws, n]: how often each of n is in a sample of n with return."""
    rng = np.random.default_rng(n)
    return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)


@lru_cache(maxsize=8)
def _students_t(freedom: int, draws: int) -> np.ndarray:
    """[draws]: quantiles of Student's t at equal distances, in a random order: they have its tails,
    which as many plain draws would not."""
    rng = np.random.default_rng(freedom)
    known = rng.standard_t(freedom, 1_000_000)
    return rng.permutation(np.quantile(known, (np.arange(draws) + 0.5) / draws))


def smooth(values: list[float], window: int) -> list[float]:
    """Mean of each value and the `window` - 1 before it (fewer at the start)."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return [float(x) for x in (sums[ends] - sums[starts]) / (ends - starts)]


def first_reached(values: list[float], level: float) -> int | None:
    """Index of the first value at or above `level`; None where there is none."""
    return next((i for i, value in enumerate(values) if value >= level), None)
