"""Draws the plots of time, memory and accuracy: rows of dots with their figures beside them.

Told apart by shape, filling and line style, so that they read the same in grey.
"""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath

from bench.ops import FLOOR, FLOORS
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
from bench.reporting.figures import ShapeFigures, Spread
from bench.reporting.tables import describe, error, megabytes, number, ratio_text, scientific, times
from bench.results_file import BOTH_OURS, OURS, SKETCH

ROW, HEAD, SPACE = 0.215, 0.34, 0.12  # inches: a row of dots, a panel's heading, between panels
TOP, BOTTOM = 1.0, 0.3  # inches above and below all panels
TICKS = 0.2  # inches, of the labels below an axis
COLORS = {OURS: ACCENT, SKETCH: WARM}
OTHERS = "others"
KEYS = {OURS: "ours", SKETCH: "our sketch", OTHERS: OTHERS}
"""Names of the three kinds of dots."""
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


@dataclass(frozen=True, slots=True)
class Dots:
    """A provider's row in a panel: one dot or two, and figures."""

    name: str
    spreads: tuple[Spread | None, ...]
    """One for each series of the panel: the dot is the median, the whisker the quartiles."""
    figures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel of a plot shows one operation."""

    title: str
    rows: list[Dots]
    columns: tuple[str, ...]
    """Heading of each column of figures."""
    tick: float | None = None
    """Place of a vertical line: the floor, or a rounding unit."""
    missing: tuple[str, ...] = ()
    """Providers with a figure in another panel and none in this one."""
    aligned: bool = False
    """Whether the tick is at the same place as in other panels, so that ratios compare."""

    @property
    def note(self) -> list[str]:
        """Return the lines of text below the rows."""
        text = f"no figure: {_list(self.missing)}" if self.missing else ""
        return textwrap.wrap(text, 76, break_on_hyphens=False)

    @property
    def names(self) -> float:
        """Return the width of the longest name, in inches."""
        return max(_inches(row.name) for row in self.rows) + 0.2

    @property
    def figures(self) -> float:
        """Return the width of a column of figures, in inches."""
        every = [*self.columns, *(text for row in self.rows for text in row.figures)]
        return max(_inches(text) for text in every) + 0.12

    @property
    def height(self) -> float:
        """Return the height of the panel, in inches."""
        lines = len(self.rows) + 0.86 * len(self.note)
        return HEAD + ROW * lines + SPACE + (TICKS if self.aligned else 0)


@dataclass(frozen=True, slots=True)
class Shared:
    """Sizes that all panels of a plot share."""

    limits: tuple[float, float]
    """Limits of the axis; relative to the tick where panels are aligned."""
    names: float
    """Width of the column of names, in inches."""
    figures: float
    """Width of a column of figures, in inches."""


def time_plot(group: ShapeFigures, machine: str, path: Path) -> None:
    """Draw the time of each provider by operation, and the floor."""
    panels = []
    floors = {op: group.find(op, FLOOR) for op in group.cases}
    aligned = all(floor and floor.total for floor in floors.values())
    for op, cases in group.cases.items():
        floor = floors[op]
        rows = [
            Dots(c.provider, (c.total,), (number(c.total.median), ratio_text(c.per_floor)))
            for c in cases
            if c.total and c.provider != FLOOR
        ]
        tick = floor.total.median if floor and floor.total else None
        title = op if tick is None else f"{op}  ·  floor {number(tick)} ms"
        missing = _missing(group, op, "total")
        panels.append(Panel(title, rows, ("ms", "/ floor"), tick, missing, aligned))
    legend = [
        *_dot_keys(),
        Line2D([], [], color=INK, linewidth=2, label="floor: the bare GEMMs"),
    ]
    title = "Time, forward and backward (ms, logarithmic; whiskers: quartiles"
    title += ", panels aligned at the floor)" if aligned else ")"
    _dot_plot(group, machine, title, panels, legend, path, _never(group, "total"))


def memory_plot(group: ShapeFigures, machine: str, path: Path) -> None:
    """Draw the extra memory of each provider by operation."""
    panels = []
    for op, cases in group.cases.items():
        ours = group.find(op, OURS)
        our_bytes = ours.extra_bytes if ours else None
        held = [(c, c.extra_bytes) for c in cases if c.extra_bytes is not None]
        rows = []
        for case, size in sorted(held, key=lambda pair: pair[1]):
            ratio = times(size / our_bytes) if our_bytes and our_bytes > 0 else ""
            shown = _point(max(size / 1e6, 0.1))  # nothing at all is not on a log axis
            rows.append(Dots(case.provider, (shown,), (megabytes(size), ratio)))
        panels.append(Panel(op, rows, ("MB", "/ ours"), None, _missing(group, op, "extra_bytes")))
    title = "Memory beyond inputs, outputs and gradients (MB, logarithmic; below 0.1 shown as 0.1)"
    _dot_plot(group, machine, title, panels, _dot_keys(), path, _never(group, "extra_bytes"))


def accuracy_plot(group: ShapeFigures, machine: str, path: Path) -> None:
    """Draw the largest errors of dX and of the log-probabilities by operation and provider."""
    eps = EPS.get(group.dtype)
    panels = []
    for op, cases in group.cases.items():
        rows = []
        for case in (c for c in cases if c.errors):
            pair = [error(case, name, "max") for name in ("dhidden", "logprobs")]
            shown = [None if x is None else _point(max(x, 1e-12)) for x in pair]
            figures = tuple(scientific(x) for x in pair)
            rows.append(Dots(case.provider, tuple(shown), figures))
        rows.sort(key=lambda row: [one.median if one else 0.0 for one in row.spreads])
        panels.append(Panel(op, rows, ("dX", "log-prob"), eps, _missing(group, op, "errors")))
    legend = [*_dot_keys("dX, "), *_dot_keys("log-prob, ", second=True)]
    if eps:
        legend.append(Line2D([], [], color=INK, linewidth=2, label=f"eps of {group.dtype}"))
    title = "Largest error against float64, relative to the largest exact value (logarithmic)"
    _dot_plot(group, machine, title, panels, legend, path, _never(group, "errors"))


def _list(names: Iterable[str]) -> str:
    """List names, which may hold commas, so that no line breaks inside of one."""
    return " · ".join(name.replace(" ", "\N{NO-BREAK SPACE}") for name in names)


def _point(x: float) -> Spread:
    """Return a spread without quartiles."""
    return Spread(x, x, x)


def _missing(group: ShapeFigures, op: str, figure: str) -> tuple[str, ...]:
    """List the providers that have such a figure in another operation alone."""
    here = {case.provider for case in group.cases[op] if getattr(case, figure)}
    return tuple(name for name in _some(group, figure) if name not in here)


def _some(group: ShapeFigures, figure: str) -> list[str]:
    every = [case for cases in group.cases.values() for case in cases]
    names = dict.fromkeys(case.provider for case in every if getattr(case, figure))
    return [name for name in names if name not in FLOORS]


def _never(group: ShapeFigures, figure: str) -> str:
    """Write the footnote: who has no such figure in any operation, with the first reason."""
    some = _some(group, figure)
    why: dict[str, dict[str, None]] = {}
    for case in (case for cases in group.cases.values() for case in cases):
        if case.provider not in (*some, *FLOORS):
            why.setdefault(case.status.split(":")[0], {})[case.provider] = None
    return "; ".join(f"{status}: {_list(names)}" for status, names in why.items())


def _dot_keys(what: str = "", second: bool = False) -> list[Line2D]:
    return [
        Line2D([], [], linestyle="none", label=what + label, **_dot_style(name, second))
        for name, label in KEYS.items()
    ]


def _dot_style(provider: str, second: bool = False) -> dict[str, Any]:
    """Return the style of a dot: ours is filled, and a second series has another shape."""
    ours, color = provider in BOTH_OURS, COLORS.get(provider, PALE)
    return {
        "marker": ("^" if second else "D") if ours else ("v" if second else "o"),
        "markersize": 7.5 if ours else 6.5,
        "markerfacecolor": color if ours else "white",
        "markeredgecolor": color,
        "markeredgewidth": 1.3,
    }


def _dot_plot(
    group: ShapeFigures,
    machine: str,
    title: str,
    panels: list[Panel],
    legend: list[Line2D],
    path: Path,
    footnote: str,
) -> None:
    """Draw the panels in two columns of about the same height, all on one axis."""
    panels = [panel for panel in panels if panel.rows]
    if not panels:
        return
    columns = _in_two(panels)
    notes = textwrap.wrap(f"No figure anywhere: {footnote}.", 150) if footnote else []
    below = BOTTOM + 0.17 * len(notes)
    height = TOP + max(sum(panel.height for panel in column) for column in columns) + below
    with mpl.rc_context({"font.size": SIZE, "font.family": "DejaVu Sans"}):
        figure = Figure((WIDTH, height), dpi=DPI)
        headline(figure, height, title, f"{_what(group)}\n{machine}")
        figure.legend(
            handles=legend,
            loc="upper left",
            bbox_to_anchor=(0.005, 1 - 0.72 / height),
            ncol=len(legend),
            frameon=False,
            handletextpad=0.4,
            columnspacing=1.6,
            borderpad=0.1,
        )
        shared = Shared(
            _limits(panels), max(p.names for p in panels), max(p.figures for p in panels)
        )
        for index, column in enumerate(columns):
            y = height - TOP
            for panel in column:
                _draw(figure, panel, index * WIDTH / 2, y, shared, panel is column[-1])
                y -= panel.height
        for line, text in enumerate(reversed(notes)):
            figure.text(0.012, (0.09 + 0.17 * line) / height, text, color=PALE, fontsize=9)
        figure.savefig(path)


def _in_two(panels: list[Panel]) -> list[list[Panel]]:
    """Cut the panels into two columns so that the taller one is as short as possible."""

    def taller(cut: int) -> float:
        return max(sum(p.height for p in part) for part in (panels[:cut], panels[cut:]))

    cut = min(range(1, len(panels) + 1), key=taller)
    return [part for part in (panels[:cut], panels[cut:]) if part]


def _limits(panels: list[Panel]) -> tuple[float, float]:
    """Compute the limits of the axis over all panels."""
    seen = []
    for panel in panels:
        unit = panel.tick if panel.tick and panel.aligned else 1.0
        seen += [panel.tick / unit] if panel.tick else []
        every_spread = [one for row in panel.rows for one in row.spreads if one]
        seen += [x / unit for one in every_spread for x in (one.low, one.high)]
    low, high = min(seen), max(seen)
    room = max((high / low) ** 0.05, 1.02)
    return low / room, high * room


def _inches(text: str) -> float:
    """Return the width of a bold text, in inches."""
    if not text:
        return 0.0
    font = FontProperties(family="DejaVu Sans", weight="bold")
    return float(TextPath((0, 0), text, size=SIZE, prop=font).get_extents().width) / 72


def _what(group: ShapeFigures) -> str:
    sizes = describe(group.sizes, group.dtype)
    return f"Shape {group.shape}: {sizes}; profile {group.profile}"


def _draw(
    figure: Figure, panel: Panel, left: float, top: float, shared: Shared, last: bool
) -> None:
    """Draw one panel; left and top are in inches."""
    width, height = figure.get_size_inches()
    names, each, scale = shared.names, shared.figures, 1.0
    if panel.aligned and panel.tick:
        scale, last = panel.tick, True
    limits = (shared.limits[0] * scale, shared.limits[1] * scale)
    tall, side = ROW * len(panel.rows), each * len(panel.columns)
    wide = width / 2 - names - side - 0.25
    bounds = (
        (left + names) / width,
        (top - HEAD - tall) / height,
        wide / width,
        tall / height,
    )
    axes = figure.add_axes(bounds)
    axes.set(xscale="log", xlim=limits, ylim=(len(panel.rows) - 0.5, -0.5))
    log_axis(axes.xaxis, limits, wide, 0.4)
    axes.tick_params(axis="x", length=0, labelsize=9, colors=PALE, labelbottom=last, pad=2)
    axes.set_yticks([])
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side_name in ("left", "right", "top", "bottom"):
        axes.spines[side_name].set_visible(side_name == "bottom" and last)
        axes.spines[side_name].set_color(FAINT)
    if panel.tick:
        axes.axvline(panel.tick, color=INK, linewidth=2, zorder=1.5, solid_capstyle="butt")

    def write(x: float, row: float, text: str, **more: Any) -> None:
        """Write a text at x inches from the left end of the axes."""
        more = {"va": "center_baseline", "color": INK} | more
        axes.text(x / wide, row, text, transform=axes.get_yaxis_transform(), **more)

    write(-names + 0.12, -1.0, panel.title, weight="bold")
    for index, name in enumerate(panel.columns):
        write(wide + each * (index + 1), -1.0, name, ha="right", color=PALE, fontsize=9)
    for index, row in enumerate(panel.rows):
        _row(axes, index, row)
        color = COLORS.get(row.name)
        font = {"weight": "bold", "color": color} if color else {}
        write(-0.08, index, row.name, ha="right", **font)
        for column, text in enumerate(row.figures):
            write(wide + each * (column + 1), index, text, ha="right", **font)
    for index, text in enumerate(panel.note):
        shift = 0.0 if not last else 0.75
        y = len(panel.rows) - 0.06 + shift + 0.86 * index
        write(-names + 0.12, y, text, color=PALE, fontsize=9, style="italic")


def _row(axes: Axes, index: int, row: Dots) -> None:
    """Draw the dots and whiskers of one provider."""
    axes.axhline(index, color=FAINT, linewidth=0.6, linestyle=(0, (1, 2)), zorder=0.5)
    for series, spread in reversed(list(enumerate(row.spreads))):
        if spread is None:
            continue
        color = COLORS.get(row.name, PALE)
        if spread.high > spread.low:
            axes.plot([spread.low, spread.high], [index] * 2, color=color, linewidth=1.8, zorder=2)
            for end in (spread.low, spread.high):
                axes.plot([end] * 2, [index - 0.2, index + 0.2], color=color, lw=1.2, zorder=2)
        style = _dot_style(row.name, series == 1)
        axes.plot(spread.median, index, linestyle="none", zorder=3, clip_on=False, **style)
