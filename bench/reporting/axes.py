"""Holds what all plots share: colours, sizes, headline, logarithmic axes."""

import math
from itertools import pairwise

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

DPI = 150
WIDTH = 10.4  # inches, so 1560 pixels
SIZE = 9.5  # points
INK, PALE, FAINT, ACCENT, WARM = "#222222", "#666666", "#d8d8d8", "#0b559f", "#b34700"
STEPS = (
    *(tuple(1 + step * i for i in range(int(9 / step))) for step in (0.02, 0.05, 0.1, 0.2, 0.5)),
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    (1, 1.5, 2, 3, 5, 7),
    (1, 2, 5),
    (1, 3),
    (1,),
)
"""Sets of multiples of a power of ten that get a label, the largest set first."""


def headline(figure: Figure, height: float, title: str, lines: str) -> None:
    """Write title and machine at the top left; height of the figure in inches."""
    figure.text(0.012, 1 - 0.1 / height, title, fontsize=12.5, weight="bold", color=INK, va="top")
    figure.text(0.012, 1 - 0.36 / height, lines, fontsize=9, color=PALE, va="top", linespacing=1.3)


def log_axis(axis: Axis, limits: tuple[float, float], inches: float, apart: float) -> None:
    """Put labelled ticks on an axis, as many as have room, so many inches apart."""
    ticks = log_ticks(limits, apart / inches)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: plain(x)))


def log_ticks(limits: tuple[float, float], apart: float) -> list[float]:
    """Choose round numbers inside the limits, at least that share of the axis apart."""
    low, high = (math.floor(math.log10(x)) for x in limits)
    least = (limits[1] / limits[0]) ** apart
    ticks: list[float] = []
    for steps in STEPS:
        multiples = [step * 10.0**power for power in range(low, high + 1) for step in steps]
        ticks = [x for x in multiples if limits[0] <= x <= limits[1]]
        if all(b / a >= least for a, b in pairwise(ticks)):
            return ticks
    return ticks[:: math.ceil(math.log10(least))]


def plain(x: float) -> str:
    """Write a tick: 2,000, 0.5, 1e-07."""
    if x < 1e-3:
        return f"{x:.0e}"
    return f"{x:,.0f}" if x >= 1000 else f"{x:g}"
