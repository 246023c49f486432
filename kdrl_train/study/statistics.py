"""Intervals of a study: means over seeds and problems, and paired differences, by bootstrap.

S seeds (runs of an arm), P problems (the same ones in every run), D draws.
"""

from dataclasses import dataclass

import numpy as np

DRAWS = 4000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of 0, else 0."""
        return (self.low > 0) - (self.high < 0)


def estimate(scores_SP: np.ndarray, draws: int = DRAWS) -> Estimate:
    """Mean over seeds and problems, and its 95% percentile interval by bootstrap.

    Both seeds and problems are drawn with return, independently, since both are samples: another
    study would have others. With one seed only problems vary, and the interval says nothing about
    another run. The draws are the same for every call with these S and P.

    Args:
        scores_SP: [S, P] float, S and P at least 1; for a paired difference of two arms, their
            difference: same seed and same problem in the same place.
    """
    S, P = scores_SP.shape
    rng = np.random.default_rng([S, P])
    seeds_DS = _counts(rng, draws, S)
    problems_DP = _counts(rng, draws, P)
    means_D = ((seeds_DS @ scores_SP) * problems_DP).sum(axis=1) / (S * P)
    low, high = np.quantile(means_D, (0.025, 0.975))
    return Estimate(float(scores_SP.mean()), float(low), float(high))


def _counts(rng: np.random.Generator, draws: int, n: int) -> np.ndarray:
    """[draws, n]: how often each of n is in a sample of n with return."""
    return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)


def interquartile(values: list[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(median), float(low), float(high)


def smooth(values: list[float], window: int) -> list[float]:
    """Mean of each value and the `window` - 1 before it (fewer at the start)."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return [float(x) for x in (sums[ends] - sums[starts]) / (ends - starts)]


def first_reached(values: list[float], level: float) -> int | None:
    """Index of the first value at or above `level`; None where there is none."""
    return next((i for i, value in enumerate(values) if value >= level), None)
