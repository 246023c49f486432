"""Draws what a sketch costs and saves: error of dX against time, by threshold."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.machine import one_line
from bench.reporting.axes import (
    ACCENT,
    DPI,
    FAINT,
    INK,
    PALE,
    SIZE,
    WARM,
    WIDTH,
    headline,
    log_axis,
)

HEIGHT, TOP, TALL, LEFT, BETWEEN = 4.5, 1.25, 2.7, 0.62, 0.2  # inches
EXACT, ROUNDED = "exact", "bfloat16 operands"
MARKS = (("D", ACCENT), ("o", WARM), ("s", "#00735c"))
"""Marker and colour of each operation."""

Row = dict[str, Any]
"""A row of measures/sketch.py."""


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the rows of a run of measures/sketch.py: a panel a profile, a line an operation."""
    rows: list[Row] = record["rows"]
    profiles, ops = (list(dict.fromkeys(row[name] for row in rows)) for name in ("profile", "op"))
    every = [point for row in rows for point in (*_sketches(row).values(), *_exact(row))]
    if not every:
        return  # no case was timed
    errors = [y for _, y in every] + [y for row in rows for y in _rounded(row)]
    limits = min(errors) / 2, max(errors) * 2
    wide = (WIDTH - LEFT - 0.15 - BETWEEN * (len(profiles) - 1)) / len(profiles)
    with mpl.rc_context({"font.size": SIZE, "font.family": "DejaVu Sans"}):
        figure = Figure((WIDTH, HEIGHT), dpi=DPI)
        title = "Relative error of dX against time, by threshold of the sketch"
        headline(figure, HEIGHT, title, f"Shape {record['shape']}\n{one_line(record['machine'])}")
        corner = 0.005, 1 - 0.72 / HEIGHT
        keys = _keys(ops)
        figure.legend(
            handles=keys, loc="upper left", bbox_to_anchor=corner, ncol=len(keys), frameon=False
        )
        for place, profile in enumerate(profiles):
            left = LEFT + place * (wide + BETWEEN)
            bottom = HEIGHT - TOP - TALL
            axes = figure.add_axes(
                (left / WIDTH, bottom / HEIGHT, wide / WIDTH, TALL / HEIGHT),
                yscale="log",
                xlim=(0, 1.25 * max(x for x, _ in every)),
                ylim=limits,
            )
            _frame(axes, profile, first=place == 0)
            log_axis(axes.yaxis, limits, TALL, 0.3)
            panel = [row for row in rows if row["profile"] == profile]
            slowest = max(panel, key=lambda row: max(_sketches(row).values(), default=(0, 0)))
            for row in panel:
                _draw(axes, row, *MARKS[ops.index(row["op"]) % len(MARKS)])
            for name, point in _sketches(slowest).items():  # the others' are beside these
                axes.annotate(name, point, (6, 4), textcoords="offset points", color=INK)
        figure.savefig(path)


def _sketches(row: Row) -> dict[str, tuple[float, float]]:
    """Return {threshold: (time / bare GEMMs, error of dX)}."""
    return {
        name: (case["ratio"], case["errors"]["dhidden"])
        for name, case in row["cases"].items()
        if "e-" in name and "ratio" in case
    }


def _exact(row: Row) -> list[tuple[float, float]]:
    case = row["cases"][EXACT]
    return [(case["ratio"], case["errors"]["dhidden"])] if "ratio" in case else []


def _rounded(row: Row) -> list[float]:
    return [row["cases"][ROUNDED]["errors"]["dhidden"]]


def _draw(axes: Axes, row: Row, marker: str, color: str) -> None:
    """Draw an operation: its thresholds, its exact gradient, the error of bfloat16 operands."""
    sketches = _sketches(row)
    line = {"marker": marker, "color": color, "markersize": 6, "linewidth": 1.4}
    axes.plot(*zip(*sketches.values(), strict=True), **line) if sketches else None
    for x, y in _exact(row):
        axes.plot(x, y, **line, markerfacecolor="white", clip_on=False)
    for y in _rounded(row):
        axes.axhline(y, color=color, linewidth=1, linestyle=(0, (4, 3)), zorder=1)


def _frame(axes: Axes, profile: str, first: bool) -> None:
    """Write titles and grid of a panel; the first has the labels."""
    axes.set_title(f"profile {profile}", loc="left", fontsize=SIZE, weight="bold", color=INK, pad=5)
    if first:
        label = "time / bare GEMMs of the exact gradient"
        axes.set_xlabel(label, color=PALE, fontsize=9, loc="left")
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors=PALE, labelleft=first)
    for side in axes.spines.values():
        side.set_color(FAINT)


def _keys(ops: list[str]) -> list[Line2D]:
    keys = [
        Line2D([], [], marker=marker, color=color, label=f"{op}, sketch")
        for op, (marker, color) in zip(ops, MARKS, strict=False)
    ]
    hollow = {"marker": "o", "color": PALE, "markerfacecolor": "white", "linestyle": "none"}
    keys.append(Line2D([], [], label="exact gradient, float32", **hollow))
    dashed = {"color": PALE, "linewidth": 1, "linestyle": (0, (4, 3))}
    return [*keys, Line2D([], [], label="exact, bfloat16 operands", **dashed)]
