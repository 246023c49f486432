"""Charts as SVG text: lines with bands, values with intervals, histograms, stacked bars.

Each is readable on its own (`save`), on white and on black, and inside a page. Groups keep their
look by the index of their Look, so give the same group the same index everywhere. WIDTH is that of
a phone, where a page shows a chart at its own size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeGuard

from kdrl_train.tools.report.svg import (
    RULE,
    Axis,
    Look,
    cut,
    document,
    element,
    number,
    text,
    tooltip,
)

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 26.0, 38.0
LINE = 17.0
"""Height of a line of a legend or a table."""
NUMBERS = 118.0
"""Width of the numbers of a point chart."""
MARKS = 5
"""Marks on a line."""
STRIPS = 32
"""Places along the x axis where a pointer is told the values."""

LEVEL = {"stroke": RULE, "stroke_dasharray": "4 3", "class_": "rule strong"}

Value = float | None


@dataclass(frozen=True, slots=True)
class Series:
    """One line. x, y and the bounds of its band have one length; None, and what is not finite,
    interrupts line and band."""

    name: str
    x: Sequence[float]
    y: Sequence[Value]
    look: int = 0
    """Index of the group, for colour, dashes and mark."""
    low: Sequence[Value] | None = None
    high: Sequence[Value] | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One value, with its interval where there is one."""

    name: str
    value: Value
    low: Value = None
    high: Value = None
    look: int = 0


@dataclass(frozen=True, slots=True)
class Bars:
    """Counts or shares of the bins of a histogram."""

    name: str
    values: Sequence[float]
    look: int = 0


@dataclass(frozen=True, slots=True)
class Reference:
    """A level that a chart is read against."""

    name: str
    value: float


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "step",
    log_x: bool = False,
    log_y: bool = False,
    references: Sequence[Reference] = (),
    legend: bool = True,
) -> str:
    """Lines with bands over one x axis; a pointer is told the values.

    A logarithmic axis leaves out what is not above 0. legend: below the plot; without it, say
    elsewhere which look is which group.
    """
    series = [_drawable(one, log_x=log_x, log_y=log_y) for one in series]
    xs = [x for one in series for x, y in zip(one.x, one.y, strict=True) if y is not None]
    ys = [v for one in series for v in (*one.y, *(one.low or ()), *(one.high or ()))]
    levels = [one.value for one in references]
    plot = HEIGHT - BOTTOM
    horizontal = Axis.fit(xs, LEFT, WIDTH - RIGHT, log=log_x)
    vertical = Axis.fit([y for y in ys if y is not None] + levels, plot, TOP, log=log_y, room=0.05)
    parts = [_heading(title), *_grid(horizontal, vertical, x_label)]
    parts += [_level(one, vertical) for one in references]
    parts += [_band(one, horizontal, vertical) for one in series]
    for place, one in enumerate(series):
        parts += _line(one, horizontal, vertical, (place + 0.5) / len(series))
    parts += _strips(series, horizontal, x_label)
    height = HEIGHT
    if legend:
        parts += [_key(one.name, one.look, HEIGHT + i * LINE) for i, one in enumerate(series)]
        height += LINE * len(series)
    told = "; ".join(_told(one) for one in series) or "no values"
    return document(title, f"{title} over {x_label}. {told}.", WIDTH, height, parts)


def point_chart(
    points: Sequence[Point],
    *,
    title: str,
    x_label: str = "",
    references: Sequence[Reference] = (),
    named: float = 110.0,
) -> str:
    """A row each: name, value with its interval on a common axis, and the numbers.

    named: width of the names, longer ones are cut; with more, the chart is as much wider.
    """
    wide = WIDTH + named - 110.0
    known = [v for p in points for v in (p.value, p.low, p.high) if _finite(v)]
    levels = [one.value for one in references]
    axis = Axis.fit([*known, *levels], named, wide - NUMBERS, room=0.06)
    top = TOP + (10 if references else 0)
    bottom = top + LINE * len(points) + 4
    parts = [_heading(title)]
    for tick in axis.ticks if known else ():
        parts += [_rule(axis(tick), top - 4, axis(tick), bottom)]
        parts += [text(axis.label(tick), axis(tick), bottom + 13, anchor="middle")]
    for one in references:
        x = axis(one.value)
        parts.append(element("line", x1=x, x2=x, y1=top - 4, y2=bottom, **LEVEL))
        parts.append(text(one.name, x, top - 7, anchor="middle", font_size=10))
    for i, point in enumerate(points):
        parts += _row(point, top + LINE * i + 8, axis)
    parts.append(text(x_label, (named + wide - NUMBERS) / 2, bottom + 28, anchor="middle"))
    told = "; ".join(f"{p.name} {number(p.value)}" for p in points)
    return document(title, f"{title}: {told}.", wide, bottom + (34 if x_label else 18), parts)


def histogram_chart(
    bars: Sequence[Bars],
    labels: Sequence[str],
    *,
    title: str,
    x_label: str = "",
    legend: bool = True,
) -> str:
    """Shares of bins as outlines, a line for each group, so that several can be compared.

    labels: of the bins, as many as each has values; shown where they have room. Values are divided
    by their sum.
    """
    shares = [[v / (sum(one.values) or 1.0) for v in one.values] for one in bars]
    axis = Axis(0.0, max((v for one in shares for v in one), default=1.0) * 1.05 or 1.0, 0, 0)
    vertical = Axis(0.0, axis.high, HEIGHT - BOTTOM, TOP)
    wide = (WIDTH - LEFT - RIGHT) / len(labels)
    parts = [_heading(title)]
    for tick in vertical.ticks:
        parts.append(_rule(LEFT, vertical(tick), WIDTH - RIGHT, vertical(tick)))
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
        told = [
            f"{one.name} {100 * values[i]:.1f}%" for one, values in zip(bars, shares, strict=True)
        ]
        words = "\n".join([f"{x_label} {label}", *told])
        parts.append(_hit(LEFT + i * wide, TOP, wide, HEIGHT - BOTTOM - TOP, words))
    parts.append(text(x_label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, anchor="middle"))
    height = HEIGHT
    if legend:
        parts += [_key(one.name, one.look, HEIGHT + i * LINE) for i, one in enumerate(bars)]
        height += LINE * len(bars)
    peaks = "; ".join(
        f"{one.name}: most in {labels[values.index(max(values))]}"
        for one, values in zip(bars, shares, strict=True)
    )
    return document(title, f"Histogram, {title}. {peaks}.", WIDTH, height, parts)


def stacked_chart(
    rows: Sequence[tuple[str, dict[str, float]]], *, title: str, unit: str = "s"
) -> str:
    """A bar for each row, of parts that add up; parts keep order and look, and are named in the bar
    where they have room, and below."""
    names = list(dict.fromkeys(name for _, parts in rows for name in parts))
    most = max((sum(parts.values()) for _, parts in rows), default=1.0) or 1.0
    named, tall = 92.0, 24.0
    axis = Axis(0.0, most, named, WIDTH - 46)
    drawn = [_heading(title)]
    for i, (row, parts) in enumerate(rows):
        y, total = TOP + i * (tall + 6), 0.0
        drawn.append(text(cut(row, 14), 0, y + tall / 2 + 4))
        for name, value in parts.items():
            x, end = axis(total), axis(total + value)
            total += value
            look = Look(names.index(name))
            words = f"{row}, {name}: {number(value)} {unit}"
            paint = {"fill": look.color, "stroke": "#ffffff", "stroke_width": 1, "class_": "part"}
            box = {"x": x, "y": y, "width": max(end - x, 0.0), "height": tall}
            drawn.append(element("rect", tooltip(words), **box, **paint))
            if end - x > 6.5 * len(name) + 4:
                drawn.append(_inside(name, (x + end) / 2, y + tall / 2 + 4))
        drawn.append(text(f"{number(total)} {unit}", axis(total) + 4, y + tall / 2 + 4))
    top = TOP + len(rows) * (tall + 6) + 4
    columns = 3
    for i, name in enumerate(names):
        x, y = 4 + (i % columns) * (WIDTH / columns), top + (i // columns) * LINE
        drawn.append(element("rect", x=x, y=y, width=11, height=11, fill=Look(i).color))
        drawn.append(text(name, x + 16, y + 10))
    told = "; ".join(
        f"{row}: " + ", ".join(f"{name} {number(v)} {unit}" for name, v in parts.items())
        for row, parts in rows
    )
    height = top + LINE * math.ceil(len(names) / columns) + 4
    return document(title, f"{title}. {told}.", WIDTH, height, drawn)


def save(svg: str, path: Path) -> None:
    """A chart as a file of its own."""
    path.write_text(f'<?xml version="1.0" encoding="UTF-8"?>\n{svg}\n', encoding="utf-8")


def _row(point: Point, y: float, axis: Axis) -> list[str]:
    """A row of a point chart, y its middle."""
    look, told = Look(point.look), number(point.value)
    parts = [text(cut(point.name, int(axis.start / 6.4)), 0, y + 4)]
    if _finite(point.low) and _finite(point.high):
        low, high = axis(point.low), axis(point.high)
        told += f" ({number(point.low)} to {number(point.high)})"
        path = f"M{low:.1f} {y - 3:.1f}v6m0 -3H{high:.1f}m0 -3v6"
        parts.append(element("path", d=path, fill="none", stroke=look.color, stroke_width=1.6))
    if _finite(point.value):
        parts.append(look.mark(axis(point.value), y))
    parts.append(text(told, axis.end + 8, y + 4, font_size=10))
    return [*parts, _hit(0, y - LINE / 2, axis.end + NUMBERS, LINE, f"{point.name}: {told}")]


def _finite(value: Value) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _drawable(one: Series, *, log_x: bool, log_y: bool) -> Series:
    """Its points with a place on the axes, None for the values that have none."""

    def fits(value: Value, *, log: bool) -> Value:
        return value if _finite(value) and not (log and value <= 0) else None

    def keep(values: Sequence[Value] | None) -> list[Value] | None:
        if values is None:
            return None
        pairs = zip(values, one.x, strict=True)
        return [fits(v, log=log_y) if fits(x, log=log_x) is not None else None for v, x in pairs]

    return Series(one.name, one.x, keep(one.y) or [], one.look, keep(one.low), keep(one.high))


def _heading(title: str) -> str:
    return text(title, 0, 12, font_size=12.5, font_weight="600", class_="ink head")


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    paint = {"stroke": RULE, "stroke_width": 1, "stroke_opacity": 0.3, "class_": "rule"}
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **paint)


def _hit(x: float, y: float, width: float, height: float, words: str) -> str:
    """An area without a look that tells a pointer what is there."""
    box = {"x": x, "y": y, "width": width, "height": height}
    return element("rect", tooltip(words), **box, fill="none", pointer_events="all", class_="hit")


def _grid(horizontal: Axis, vertical: Axis, x_label: str) -> list[str]:
    parts = []
    for tick in vertical.ticks:
        y = vertical(tick)
        parts += [_rule(LEFT, y, WIDTH - RIGHT, y)]
        parts += [text(vertical.label(tick), LEFT - 5, y + 4, anchor="end")]
    for tick in horizontal.ticks:
        x = horizontal(tick)
        parts += [_rule(x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 4)]
        parts += [text(horizontal.label(tick), x, HEIGHT - BOTTOM + 15, anchor="middle")]
    scales = [
        f"{name} logarithmic" for name, axis in (("y", vertical), ("x", horizontal)) if axis.log
    ]
    label = x_label + (f" ({', '.join(scales)})" if scales else "")
    return [*parts, text(label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, anchor="middle")]


def _level(one: Reference, vertical: Axis) -> str:
    y = vertical(one.value)
    ends = {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": y, "y2": y}
    line = element("line", **ends, **LEVEL)
    return line + text(one.name, WIDTH - RIGHT, y - 3, anchor="end", font_size=10)


def _inside(name: str, x: float, y: float) -> str:
    return text(name, x, y, anchor="middle", fill="#ffffff", class_="on", font_size=10)


def _runs(one: Series, *values: Sequence[Value]) -> list[list[int]]:
    """Stretches of places where all of the values are there."""
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
        there = [(one.x[i], one.high[i]) for i in run] + [(one.x[i], one.low[i]) for i in run[::-1]]
        place = " ".join(f"{horizontal(x):.1f},{vertical(y):.1f}" for x, y in there)  # type: ignore[arg-type]
        drawn += element("polygon", points=place, fill=Look(one.look).color, opacity=0.18)
    return drawn


def _line(one: Series, horizontal: Axis, vertical: Axis, offset: float) -> list[str]:
    """Its stretches, and some marks; `offset` in [0, 1) keeps the marks of several lines apart. A
    point that has no neighbours is always marked: its line has no length."""
    look, parts, marked = Look(one.look), [], set()
    places: list[tuple[float, float]] = []
    for run in _runs(one, one.y):
        there = [(horizontal(one.x[i]), vertical(y)) for i in run if (y := one.y[i]) is not None]
        parts.append(look.line(there))
        places += there
        if len(there) == 1:
            marked.add(len(places) - 1)
    if len(places) <= MARKS:
        marked = set(range(len(places)))
    for i in range(MARKS if places else 0):
        goal = LEFT + (i + offset) / MARKS * (WIDTH - RIGHT - LEFT)
        marked.add(min(range(len(places)), key=lambda at: abs(places[at][0] - goal)))
    return parts + [look.mark(*places[i]) for i in sorted(marked)]


def _strips(series: Sequence[Series], horizontal: Axis, x_label: str) -> list[str]:
    """Areas over the plot, each with the values of all lines at one of their points."""
    xs = sorted({x for one in series for x in one.x})
    xs = xs[:: max(math.ceil(len(xs) / STRIPS), 1)]
    middles = [horizontal(x) for x in xs]
    ends = [LEFT, *((a + b) / 2 for a, b in pairwise(middles)), WIDTH - RIGHT]
    tables = [{x: i for i, x in enumerate(one.x)} for one in series]
    parts = []
    for i, x in enumerate(xs):
        told = [f"{x_label} {number(x)}"]
        for one, place in zip(series, tables, strict=True):
            if x in place and one.y[place[x]] is not None:
                told.append(_value(one, place[x]))
        parts.append(
            _hit(ends[i], TOP, ends[i + 1] - ends[i], HEIGHT - BOTTOM - TOP, "\n".join(told))
        )
    return parts


def _value(one: Series, i: int) -> str:
    words = f"{one.name}: {number(one.y[i])}"
    if one.low is not None and one.high is not None and one.low[i] is not None:
        words += f" ({number(one.low[i])} to {number(one.high[i])})"
    return words


def _told(one: Series) -> str:
    """A line in words."""
    known = [(x, y) for x, y in zip(one.x, one.y, strict=True) if y is not None]
    if not known:
        return f"{one.name}: no values"
    (x0, y0), (x1, y1) = known[0], known[-1]
    lowest, highest = (f([y for _, y in known]) for f in (min, max))
    ends = f"{number(y0)} at {number(x0)}, {number(y1)} at {number(x1)}"
    return f"{one.name}: {ends}, between {number(lowest)} and {number(highest)}"


def _key(name: str, look: int, y: float) -> str:
    return Look(look).key(4, y + 6) + text(cut(name, 48), 42, y + 10)
