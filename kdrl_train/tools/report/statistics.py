"""From runs to what is drawn: curves of groups, final values with intervals, differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from kdrl_train.tools.report.charts import Series
from kdrl_train.tools.report.runs import Column, Group, RunData, tail

POINTS = 150
"""Most points of a curve: of longer runs each is the mean of equally many steps."""
FINAL = 0.1
"""Share of a run's steps whose mean is its final value."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int = 1
    """Runs, or pairs of runs, that it is the mean of."""


def width(groups: Sequence[Group]) -> int:
    """Steps to a point of a curve, so that the longest run has at most POINTS."""
    longest = max((run.steps for group in groups for run in group.runs), default=0)
    return max(1, math.ceil(longest / POINTS))


def curve(group: Group, key: str, every: int) -> Series | None:
    """Mean over the group's runs, of each `every` steps; None where no run has a number.

    Band: the lowest and the highest of the runs; of a single one, of the steps of each point.
    A point without a number in any run interrupts the line.
    """
    columns = group.having(key)
    if not columns:
        return None
    places, runs = _binned(columns, every)
    known = ~np.isnan(runs).all(axis=0)
    mean = np.full(len(places), np.nan)
    low, high = mean.copy(), mean.copy()
    mean[known] = np.nanmean(runs[:, known], axis=0)
    if len(columns) > 1:
        low[known], high[known] = np.nanmin(runs[:, known], 0), np.nanmax(runs[:, known], 0)
    else:
        low, high = _extremes(columns[0], places, every)
    band = len(columns) > 1 or every > 1
    x = places * every + (every + 1) / 2
    bounds = (_values(low), _values(high)) if band else (None, None)
    return Series(group.name, x.tolist(), _values(mean), group.look, *bounds)


def _binned(columns: Sequence[Column], every: int) -> tuple[np.ndarray, np.ndarray]:
    """Points that some column has, and the means of each column there, NaN where it has none."""
    bins = [(column.steps - 1) // every for column in columns]
    places = np.unique(np.concatenate(bins))
    runs = np.full((len(columns), len(places)), np.nan)
    for run, column, own in zip(runs, columns, bins, strict=True):
        known = ~np.isnan(column.values)
        index = np.searchsorted(places, own[known])
        sums = np.bincount(index, column.values[known], len(places))
        counts = np.bincount(index, minlength=len(places))
        run[counts > 0] = sums[counts > 0] / counts[counts > 0]
    return places, runs


def _extremes(column: Column, places: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of each point of one run."""
    known = ~np.isnan(column.values)
    index = np.searchsorted(places, (column.steps[known] - 1) // every)
    low, high = np.full(len(places), np.inf), np.full(len(places), -np.inf)
    np.minimum.at(low, index, column.values[known])
    np.maximum.at(high, index, column.values[known])
    return np.where(np.isinf(low), np.nan, low), np.where(np.isinf(high), np.nan, high)


def _values(array: np.ndarray) -> list[float | None]:
    return [None if math.isnan(v) else v for v in array.tolist()]


def final(run: RunData, key: str) -> float | None:
    """Mean of the last tenth of a run's steps; of an evaluation, its last. None: no number."""
    column = run.columns.get(key)
    if column is None:
        return None
    last = (
        column.values[-1:] if key.startswith("eval_") else column.values[-tail(run.steps, FINAL) :]
    )
    known = last[~np.isnan(last)]
    return float(known.mean()) if len(known) else None


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean and 95% t-interval; of one value no interval, of none no mean."""
    if not values:
        return Estimate(None, count=0)
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Estimate(mean)
    reach = float(stats.t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - reach, mean + reach, count)


def estimate(group: Group, key: str) -> Estimate:
    """Final value of a group. Interval: over its runs; of one run, that of its last evaluation over
    the problems where it has one."""
    found = [value for run in group.runs if (value := final(run, key)) is not None]
    one = mean_interval(found)
    if one.count != 1 or len(group.runs) != 1:
        return one
    bounds = [final(group.runs[0], f"{key}_{end}") for end in ("low", "high")]
    return Estimate(one.value, bounds[0], bounds[1])


def difference(base: Group, other: Group, key: str) -> Estimate:
    """other - base of the final values: the mean over pairs of runs with the same seed; without two
    such pairs, of the two means, without an interval. count: pairs."""
    pairs = []
    for run in other.runs:
        twins = [one for one in base.runs if one.seed == run.seed and run.seed is not None]
        if len(twins) == 1:
            a, b = final(twins[0], key), final(run, key)
            if a is not None and b is not None:
                pairs.append(b - a)
    if len(pairs) > 1:
        return mean_interval(pairs)
    a, b = estimate(base, key).value, estimate(other, key).value
    return Estimate(None if a is None or b is None else b - a, count=len(pairs))
