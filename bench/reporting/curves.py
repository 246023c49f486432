"""Draws the scaling plot: time and memory against tokens, vocabulary and workspace."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.ops import FLOOR
from bench.reporting.axes import ACCENT, DPI, FAINT, INK, PALE, SIZE, WIDTH, headline, log_axis
from bench.reporting.figures import Line
from bench.reporting.tables import law
from bench.results_file import OURS

STYLES = (
    ("o", (0, (5, 2)), "#b34700"),
    ("s", (0, (1, 1.5)), "#00735c"),
    ("^", (0, (5, 1.5, 1, 1.5)), "#7a4fa3"),
    ("v", (0, (2, 1)), "#8a6a00"),
    ("X", (0, (8, 2)), "#a02050"),
    ("P", (0, (3, 1, 1, 1, 1, 1)), "#3f6f8f"),
    ("<", (0, (1, 3)), "#555555"),
    (">", (0, (6, 3, 1, 3)), "#884422"),
)
"""Marker, dashes and colour of each provider but ours and the floor."""
AXES = {
    "N": "tokens N",
    "V": "vocabulary V",
    "workspace": "workspace allowed, MB",
}
FIGURES = {"total_ms": "time, ms", "extra_bytes": "extra memory, MB"}
TOP, TALL, AXIS, LINE, BOTTOM = 1.02, 2.2, 0.5, 0.175, 0.0  # inches
LEFT, BETWEEN = 0.62, 0.62  # inches

Scaling = dict[tuple[str, str, str, str], list[Line]]
"""What figures.scaling returns."""


def scaling_plot(lines_by_case: Scaling, machine: str, path: Path) -> None:
    """Draw the case with the most records: a panel an axis, time above memory."""
    op, shape, profile = main_case(lines_by_case)
    panels = {
        key[3]: lines for key, lines in lines_by_case.items() if key[:3] == (op, shape, profile)
    }
    axes = [axis for axis in AXES if axis in panels]
    names = list(dict.fromkeys(line.provider for axis in axes for line in panels[axis]))
    keys = 0.2 + LINE * (max(len(lines) for lines in panels.values()))
    step = TALL + AXIS + keys
    height = TOP + 2 * step + BOTTOM
    columns = max(2, len(axes))  # one panel alone would be stretched
    wide = (WIDTH - LEFT - BETWEEN * (columns - 1) - 0.15) / columns
    with mpl.rc_context({"font.size": SIZE, "font.family": "DejaVu Sans"}):
        figure = Figure((WIDTH, height), dpi=DPI)
        title = f"How time and memory of {op} grow (both axes logarithmic)"
        headline(figure, height, title, f"Shape {shape}, profile {profile}\n{machine}")
        for row, name in enumerate(FIGURES):
            for column, axis in enumerate(axes):
                left = LEFT + column * (wide + BETWEEN)
                bottom = height - TOP - row * step - TALL
                bounds = (left / WIDTH, bottom / height, wide / WIDTH, TALL / height)
                panel = figure.add_axes(bounds)
                _draw(panel, panels[axis], name, axis, wide, names)
        figure.savefig(path)


def main_case(lines_by_case: Scaling) -> tuple[str, str, str]:
    """Return the (op, shape, profile) with the most records."""
    count: dict[tuple[str, str, str], int] = {}
    for (op, shape, profile, _), lines in lines_by_case.items():
        more = sum(len(line.points) for line in lines)
        count[op, shape, profile] = count.get((op, shape, profile), 0) + more
    return max(count, key=lambda key: count[key])


def _draw(
    axes: Axes, lines: list[Line], name: str, axis: str, wide: float, names: list[str]
) -> None:
    """Draw one panel with its key below."""
    unit = 1e6 if axis == "workspace" else 1.0
    scale = 1e6 if name == "extra_bytes" else 1.0
    seen: list[tuple[float, float]] = []
    for line in lines:
        values, figures = line.series(name)
        if not values:
            continue
        x, y = [v / unit for v in values], [f / scale for f in figures]
        seen += zip(x, y, strict=True)
        slope = line.time_power if name == "total_ms" else line.memory_power
        label = line.provider if slope is None else f"{line.provider}  ~ {law(axis, slope)}"
        axes.plot(x, y, label=label, **_style(line.provider, names))
    axes.set(xscale="log", yscale="log")
    axes.set_title(FIGURES[name], loc="left", fontsize=SIZE, weight="bold", color=INK, pad=5)
    axes.set_xlabel(AXES[axis], color=PALE, fontsize=9, labelpad=2)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.tick_params(length=0, labelsize=9, colors=PALE)
    for side in axes.spines.values():
        side.set_color(FAINT)
    if not seen:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=PALE)
        return
    for one, data, inches, apart in zip(
        (axes.xaxis, axes.yaxis), zip(*seen, strict=True), (wide, TALL), (0.52, 0.3), strict=True
    ):
        room = max((max(data) / min(data)) ** 0.06, 1.08)
        limits = (min(data) / room, max(data) * room)
        log_axis(one, limits, inches, apart)
        (axes.set_xlim if one is axes.xaxis else axes.set_ylim)(limits)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.03, -0.40 / TALL),
        frameon=False,
        fontsize=9,
        handlelength=3.6,
        borderpad=0,
        borderaxespad=0,
        labelspacing=0.25,
    )


def _style(provider: str, names: list[str]) -> dict[str, Any]:
    """Return the style of a provider's line, the same in all panels."""
    if provider == OURS:
        return {"color": ACCENT, "marker": "D", "linewidth": 2.6, "markersize": 7, "zorder": 4}
    if provider == FLOOR:
        return {"color": INK, "linewidth": 1.2, "linestyle": (0, (1, 1)), "zorder": 1.5}
    others = [name for name in names if name not in (OURS, FLOOR)]
    marker, dashes, color = STYLES[others.index(provider) % len(STYLES)]
    return {
        "color": color,
        "marker": marker,
        "linestyle": dashes,
        "linewidth": 1.4,
        "markersize": 5.5,
        "markerfacecolor": "white",
        "zorder": 3,
    }
