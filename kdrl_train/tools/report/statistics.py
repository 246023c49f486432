"""Computes what is drawn from runs: curves of groups, final values, differences, intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from kdrl_train.tools.report.charts import Series
from kdrl_train.tools.report.runs import Column, RunData, RunGroup, tail

POINTS = 150
"""Most points of a curve; in longer runs a point is the mean of several steps."""
FINAL = 0.1
"""Share of a run's steps, the last ones, whose mean is its final value."""


@dataclass(frozen=True, slots=True)
class MeanInterval:
    """Holds a mean and its 95% interval; None where it has none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int = 1
    """Number of runs, or of pairs of runs, in the mean."""


def steps_per_point(groups: Sequence[RunGroup]) -> int:
    """Returns the steps of each point of a curve, so that the longest run has at most POINTS."""
    longest = max((run.steps for group in groups for run in group.runs), default=0)
    return max(1, math.ceil(longest / POINTS))


def curve(group: RunGroup, key: str, every: int) -> Series | None:
    """Returns the mean over the group's runs of each `every` steps; None if no run has a number.

    The band goes from the lowest to the highest run; for a single run, from the lowest to the
    highest step of each point. A point without a number in any run interrupts the line.
    """
    columns = group.having(key)
    if not columns:
        return None
    points, runs = _point_means(columns, every)
    known = ~np.isnan(runs).all(axis=0)
    mean = np.full(len(points), np.nan)
    low, high = mean.copy(), mean.copy()
    mean[known] = np.nanmean(runs[:, known], axis=0)
    if len(columns) > 1:
        low[known], high[known] = np.nanmin(runs[:, known], 0), np.nanmax(runs[:, known], 0)
    else:
        low, high = _extremes(columns[0], points, every)
    band = len(columns) > 1 or every > 1
    x = points * every + (every + 1) / 2
    bounds = (_values(low), _values(high)) if band else (None, None)
    return Series(group.name, x.tolist(), _values(mean), group.look, *bounds)


def _point_means(columns: Sequence[Column], every: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the points that some column has, and the means of each column there, or NaN."""
    points_of = [(column.steps - 1) // every for column in columns]
    points = np.unique(np.concatenate(points_of))
    runs = np.full((len(columns), len(points)), np.nan)
    for run, column, run_points in zip(runs, columns, points_of, strict=True):
        known = ~np.isnan(column.values)
        index = np.searchsorted(points, run_points[known])
        sums = np.bincount(index, column.values[known], len(points))
        counts = np.bincount(index, minlength=len(points))
        run[counts > 0] = sums[counts > 0] / counts[counts > 0]
    return points, runs


def _extremes(column: Column, points: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lowest and the highest value of each point of one run."""
    known = ~np.isnan(column.values)
    index = np.searchsorted(points, (column.steps[known] - 1) // every)
    low, high = np.full(len(points), np.inf), np.full(len(points), -np.inf)
    np.minimum.at(low, index, column.values[known])
    np.maximum.at(high, index, column.values[known])
    return np.where(np.isinf(low), np.nan, low), np.where(np.isinf(high), np.nan, high)


def _values(array: np.ndarray) -> list[float | None]:
    return [None if math.isnan(v) else v for v in array.tolist()]


def final(run: RunData, key: str) -> float | None:
    """Returns the mean of the last tenth of a run's steps; of evaluations, the last value.

    None where the run has no number.
    """
    column = run.columns.get(key)
    if column is None:
        return None
    last = (
        column.values[-1:]
        if key.startswith(("eval_", "eval/"))
        else column.values[-tail(run.steps, FINAL) :]
    )
    known = last[~np.isnan(last)]
    return float(known.mean()) if len(known) else None


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Returns the mean and its 95% t-interval; one value has no interval, none has no mean."""
    if not values:
        return MeanInterval(None, count=0)
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return MeanInterval(mean)
    reach = float(stats.t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return MeanInterval(mean, mean - reach, mean + reach, count)


def final_interval(group: RunGroup, key: str) -> MeanInterval:
    """Returns the final value of a group with an interval over its runs.

    The interval of a single run is that of its last evaluation over the problems, if it has one.
    """
    finals = [value for run in group.runs if (value := final(run, key)) is not None]
    mean = mean_interval(finals)
    if mean.count != 1 or len(group.runs) != 1:
        return mean
    bounds = [final(group.runs[0], f"{key}_{end}") for end in ("low", "high")]
    return MeanInterval(mean.value, bounds[0], bounds[1])


def difference(base: RunGroup, other: RunGroup, key: str) -> MeanInterval:
    """Returns the difference other - base of the final values, as a mean over runs of equal seeds.

    `count` is the number of such pairs. With fewer than two, it is the difference of the two means,
    without an interval.
    """
    pairs = []
    for run in other.runs:
        twins = [one for one in base.runs if one.seed == run.seed and run.seed is not None]
        if len(twins) == 1:
            a, b = final(twins[0], key), final(run, key)
            if a is not None and b is not None:
                pairs.append(b - a)
    if len(pairs) > 1:
        return mean_interval(pairs)
    a, b = final_interval(base, key).value, final_interval(other, key).value
    return MeanInterval(None if a is None or b is None else b - a, count=len(pairs))
