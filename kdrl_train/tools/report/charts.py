"""Draws charts as SVG text: lines with bands, values with intervals, histograms, stacked bars.

A chart can be read on its own (`save`), on white and on black, and inside a page. A group keeps its
look by the index of its Look, so give the same group the same index in all charts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kdrl_train.tools.report.chart_parts import (
    BOTTOM,
    DASHED,
    HEIGHT,
    LEFT,
    LINE,
    RIGHT,
    TOP,
    WIDTH,
    Value,
    grid,
    heading,
    hover_area,
    is_finite,
    legend_entry,
    reference_line,
    rule,
)
from kdrl_train.tools.report.svg import Axis, Look, cut, document, element, number, text, tooltip

NUMBERS = 118.0
"""Width of the numbers of a point chart."""
MARKS = 5
"""Marks on a line."""
HOVER_AREAS = 32
"""Most areas along the x axis that show values while the pointer is over them."""


@dataclass(frozen=True, slots=True)
class Series:
    """Holds one line. x, y and the bounds of its band have one length; None, and a number that is
    not finite, interrupts line and band."""

    name: str
    x: Sequence[float]
    y: Sequence[Value]
    look: int = 0
    """Index of the group, for colour, dashes and mark."""
    low: Sequence[Value] | None = None
    high: Sequence[Value] | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """Holds one value, and its interval if it has one."""

    name: str
    value: Value
    low: Value = None
    high: Value = None
    look: int = 0


@dataclass(frozen=True, slots=True)
class Bars:
    """Holds the counts, or the shares, of a histogram."""

    name: str
    values: Sequence[float]
    look: int = 0


@dataclass(frozen=True, slots=True)
class Reference:
    """Names a level that the values of a chart are compared with."""

    name: str
    value: float


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "step",
    log_x: bool = False,
    references: Sequence[Reference] = (),
    legend: bool = True,
) -> str:
    """Draws lines with bands over one x axis; the pointer shows values.

    log_x: places x by its logarithm, and leaves out values at an x that is not above 0. legend:
    draws one below the plot; without it, the page must say which look is which group.
    """
    series = [_drawable(one, log_x) for one in series]
    xs = [x for one in series for x, y in zip(one.x, one.y, strict=True) if y is not None]
    ys = [v for one in series for v in (*one.y, *(one.low or ()), *(one.high or ()))]
    levels = [one.value for one in references]
    plot = HEIGHT - BOTTOM
    horizontal = Axis.fit(xs, LEFT, WIDTH - RIGHT, log=log_x)
    vertical = Axis.fit([y for y in ys if y is not None] + levels, plot, TOP, room=0.05)
    parts = [heading(title), *grid(horizontal, vertical, x_label)]
    parts += [reference_line(one.name, one.value, vertical) for one in references]
    parts += [_band(one, horizontal, vertical) for one in series]
    for place, one in enumerate(series):
        parts += _line(one, horizontal, vertical, (place + 0.5) / len(series))
    parts += _hover_areas(series, horizontal, x_label)
    height = HEIGHT
    if legend:
        parts += [
            legend_entry(one.name, one.look, HEIGHT + i * LINE) for i, one in enumerate(series)
        ]
        height += LINE * len(series)
    words = "; ".join(_describe(one) for one in series) or "no values"
    return document(title, f"{title} over {x_label}. {words}.", WIDTH, height, parts)


def point_chart(
    points: Sequence[Point],
    *,
    title: str,
    x_label: str = "",
    references: Sequence[Reference] = (),
    named: float = 110.0,
) -> str:
    """Draws a line for each point: name, value with interval on a common axis, and the numbers.

    named: width of the names; longer names are cut. A larger value makes the chart wider.
    """
    wide = WIDTH + named - 110.0
    known = [v for p in points for v in (p.value, p.low, p.high) if is_finite(v)]
    levels = [one.value for one in references]
    axis = Axis.fit([*known, *levels], named, wide - NUMBERS, room=0.06)
    top = TOP + (10 if references else 0)
    bottom = top + LINE * len(points) + 4
    parts = [heading(title)]
    for tick in axis.ticks if known else ():
        parts += [rule(axis(tick), top - 4, axis(tick), bottom)]
        parts += [text(axis.label(tick), axis(tick), bottom + 13, anchor="middle")]
    for one in references:
        x = axis(one.value)
        parts.append(element("line", x1=x, x2=x, y1=top - 4, y2=bottom, **DASHED))
        parts.append(text(one.name, x, top - 7, anchor="middle", font_size=10))
    for i, point in enumerate(points):
        parts += _point(point, top + LINE * i + 8, axis)
    parts.append(text(x_label, (named + wide - NUMBERS) / 2, bottom + 28, anchor="middle"))
    words = "; ".join(f"{p.name} {number(p.value)}" for p in points)
    return document(title, f"{title}: {words}.", wide, bottom + (34 if x_label else 18), parts)


def histogram_chart(
    bars: Sequence[Bars],
    labels: Sequence[str],
    *,
    title: str,
    x_label: str = "",
    legend: bool = True,
) -> str:
    """Draws histograms as outlines, one for each group, so that they can be compared.

    labels: the interval of each value, shown where there is room. Values are divided by their sum.
    """
    shares = [[v / (sum(one.values) or 1.0) for v in one.values] for one in bars]
    axis = Axis(0.0, max((v for one in shares for v in one), default=1.0) * 1.05 or 1.0, 0, 0)
    vertical = Axis(0.0, axis.high, HEIGHT - BOTTOM, TOP)
    wide = (WIDTH - LEFT - RIGHT) / len(labels)
    parts = [heading(title)]
    for tick in vertical.ticks:
        parts.append(rule(LEFT, vertical(tick), WIDTH - RIGHT, vertical(tick)))
        parts.append(text(f"{100 * tick:g}%", LEFT - 5, vertical(tick) + 4, anchor="end"))
    every = math.ceil(max(len(label) for label in labels) * 6.5 / wide)
    for i in range(0, len(labels), every):
        x = LEFT + (i + 0.5) * wide
        parts.append(text(labels[i], x, HEIGHT - BOTTOM + 14, anchor="middle", font_size=10))
    for one, values in zip(bars, shares, strict=True):
        corners = [(LEFT, vertical(0))]
        for i, value in enumerate(values):
            corners += [(LEFT + (i + at) * wide, vertical(value)) for at in (0, 1)]
        corners.append((WIDTH - RIGHT, vertical(0)))
        place = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        parts.append(element("polygon", points=place, fill=Look(one.look).color, opacity=0.14))
        parts.append(Look(one.look).line(corners))
    for i, label in enumerate(labels):
        lines = [
            f"{one.name} {100 * values[i]:.1f}%" for one, values in zip(bars, shares, strict=True)
        ]
        words = "\n".join([f"{x_label} {label}", *lines])
        parts.append(hover_area(LEFT + i * wide, TOP, wide, HEIGHT - BOTTOM - TOP, words))
    parts.append(text(x_label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, anchor="middle"))
    height = HEIGHT
    if legend:
        parts += [legend_entry(one.name, one.look, HEIGHT + i * LINE) for i, one in enumerate(bars)]
        height += LINE * len(bars)
    peaks = "; ".join(
        f"{one.name}: most in {labels[values.index(max(values))]}"
        for one, values in zip(bars, shares, strict=True)
    )
    return document(title, f"Histogram, {title}. {peaks}.", WIDTH, height, parts)


def stacked_chart(
    bars: Sequence[tuple[str, dict[str, float]]], *, title: str, unit: str = "s"
) -> str:
    """Draws a bar for each (name, parts), whose parts add up; a legend names the parts."""
    names = list(dict.fromkeys(name for _, parts in bars for name in parts))
    most = max((sum(parts.values()) for _, parts in bars), default=1.0) or 1.0
    named, tall = 92.0, 24.0
    axis = Axis(0.0, most, named, WIDTH - 46)
    drawn = [heading(title)]
    for i, (bar, parts) in enumerate(bars):
        y, total = TOP + i * (tall + 6), 0.0
        drawn.append(text(cut(bar, 14), 0, y + tall / 2 + 4))
        for name, value in parts.items():
            x, end = axis(total), axis(total + value)
            total += value
            look = Look(names.index(name))
            words = f"{bar}, {name}: {number(value)} {unit}"
            paint = {"fill": look.color, "stroke": "#ffffff", "stroke_width": 1, "class_": "part"}
            box = {"x": x, "y": y, "width": max(end - x, 0.0), "height": tall}
            drawn.append(element("rect", tooltip(words), **box, **paint))
            if end - x > 6.5 * len(name) + 4:
                drawn.append(_inside(name, (x + end) / 2, y + tall / 2 + 4))
        drawn.append(text(f"{number(total)} {unit}", axis(total) + 4, y + tall / 2 + 4))
    top = TOP + len(bars) * (tall + 6) + 4
    columns = 3
    for i, name in enumerate(names):
        x, y = 4 + (i % columns) * (WIDTH / columns), top + (i // columns) * LINE
        drawn.append(element("rect", x=x, y=y, width=11, height=11, fill=Look(i).color))
        drawn.append(text(name, x + 16, y + 10))
    words = "; ".join(
        f"{bar}: " + ", ".join(f"{name} {number(v)} {unit}" for name, v in parts.items())
        for bar, parts in bars
    )
    height = top + LINE * math.ceil(len(names) / columns) + 4
    return document(title, f"{title}. {words}.", WIDTH, height, drawn)


def save(svg: str, path: Path) -> None:
    """Writes a chart to a file."""
    path.write_text(f'<?xml version="1.0" encoding="UTF-8"?>\n{svg}\n', encoding="utf-8")


def _point(point: Point, y: float, axis: Axis) -> list[str]:
    """Draws a line of a point chart, with its middle at y."""
    look, words = Look(point.look), number(point.value)
    parts = [text(cut(point.name, int(axis.start / 6.4)), 0, y + 4)]
    if is_finite(point.low) and is_finite(point.high):
        low, high = axis(point.low), axis(point.high)
        words += f" ({number(point.low)} to {number(point.high)})"
        path = f"M{low:.1f} {y - 3:.1f}v6m0 -3H{high:.1f}m0 -3v6"
        parts.append(element("path", d=path, fill="none", stroke=look.color, stroke_width=1.6))
    if is_finite(point.value):
        parts.append(look.mark(axis(point.value), y))
    parts.append(text(words, axis.end + 8, y + 4, font_size=10))
    return [*parts, hover_area(0, y - LINE / 2, axis.end + NUMBERS, LINE, f"{point.name}: {words}")]


def _drawable(one: Series, log_x: bool) -> Series:
    """Replaces the values that have no place on the axes by None."""
    placed = [is_finite(x) and not (log_x and x <= 0) for x in one.x]

    def keep(values: Sequence[Value]) -> list[Value]:
        pairs = zip(values, placed, strict=True)
        return [value if fits and is_finite(value) else None for value, fits in pairs]

    low, high = (None if bound is None else keep(bound) for bound in (one.low, one.high))
    return Series(one.name, one.x, keep(one.y), one.look, low, high)


def _inside(name: str, x: float, y: float) -> str:
    return text(name, x, y, anchor="middle", fill="#ffffff", class_="on", font_size=10)


def _runs(one: Series, *values: Sequence[Value]) -> list[list[int]]:
    """Returns the stretches of indices at which no value is None."""
    runs: list[list[int]] = [[]]
    for i in range(len(one.x)):
        if any(v[i] is None for v in values):
            runs.append([])
        else:
            runs[-1].append(i)
    return [run for run in runs if run]


def _band(one: Series, horizontal: Axis, vertical: Axis) -> str:
    if one.low is None or one.high is None:
        return ""
    drawn = ""
    for run in _runs(one, one.low, one.high):
        edge = [(one.x[i], one.high[i]) for i in run] + [(one.x[i], one.low[i]) for i in run[::-1]]
        place = " ".join(f"{horizontal(x):.1f},{vertical(y):.1f}" for x, y in edge)  # type: ignore[arg-type]
        drawn += element("polygon", points=place, fill=Look(one.look).color, opacity=0.18)
    return drawn


def _line(one: Series, horizontal: Axis, vertical: Axis, offset: float) -> list[str]:
    """Draws a line and some marks on it; `offset` in [0, 1) keeps the marks of several lines apart.
    A point without neighbours is always marked, since its line has no length."""
    look, parts, marked = Look(one.look), [], set()
    places: list[tuple[float, float]] = []
    for run in _runs(one, one.y):
        stretch = [(horizontal(one.x[i]), vertical(y)) for i in run if (y := one.y[i]) is not None]
        parts.append(look.line(stretch))
        places += stretch
        if len(stretch) == 1:
            marked.add(len(places) - 1)
    if len(places) <= MARKS:
        marked = set(range(len(places)))
    for i in range(MARKS if places else 0):
        goal = LEFT + (i + offset) / MARKS * (WIDTH - RIGHT - LEFT)
        marked.add(min(range(len(places)), key=lambda at: abs(places[at][0] - goal)))
    return parts + [look.mark(*places[i]) for i in sorted(marked)]


def _hover_areas(series: Sequence[Series], horizontal: Axis, x_label: str) -> list[str]:
    """Draws areas over the plot that show the values of all lines at some of their points."""
    xs = sorted({x for one in series for x in one.x})
    xs = xs[:: max(math.ceil(len(xs) / HOVER_AREAS), 1)]
    middles = [horizontal(x) for x in xs]
    ends = [LEFT, *((a + b) / 2 for a, b in pairwise(middles)), WIDTH - RIGHT]
    tables = [{x: i for i, x in enumerate(one.x)} for one in series]
    parts = []
    for i, x in enumerate(xs):
        lines = [f"{x_label} {number(x)}"]
        for one, place in zip(series, tables, strict=True):
            if x in place and one.y[place[x]] is not None:
                lines.append(_value_text(one, place[x]))
        parts.append(
            hover_area(ends[i], TOP, ends[i + 1] - ends[i], HEIGHT - BOTTOM - TOP, "\n".join(lines))
        )
    return parts


def _value_text(one: Series, i: int) -> str:
    words = f"{one.name}: {number(one.y[i])}"
    if one.low is not None and one.high is not None and one.low[i] is not None:
        words += f" ({number(one.low[i])} to {number(one.high[i])})"
    return words


def _describe(one: Series) -> str:
    """Describes a line in words."""
    known = [(x, y) for x, y in zip(one.x, one.y, strict=True) if y is not None]
    if not known:
        return f"{one.name}: no values"
    (x0, y0), (x1, y1) = known[0], known[-1]
    lowest, highest = (f([y for _, y in known]) for f in (min, max))
    ends = f"{number(y0)} at {number(x0)}, {number(y1)} at {number(x1)}"
    return f"{one.name}: {ends}, between {number(lowest)} and {number(highest)}"
