"""Draws the parts that several charts share: headings, axes with a grid, legends, hover areas.

WIDTH is that of a phone, where a page shows a chart at full size.
"""

import math
from typing import TypeGuard

from kdrl_train.tools.report.svg import RULE, Axis, Look, cut, element, text, tooltip

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 26.0, 38.0
LINE = 17.0
"""Height of a line of a legend or a table."""
DASHED = {"stroke": RULE, "stroke_dasharray": "4 3", "class_": "rule strong"}
"""Attributes of a reference line."""

Value = float | None


def is_finite(value: Value) -> TypeGuard[float]:
    """Says whether a value can be drawn."""
    return value is not None and math.isfinite(value)


def heading(title: str) -> str:
    """Draws the title of a chart."""
    return text(title, 0, 12, font_size=12.5, font_weight="600", class_="ink head")


def rule(x1: float, y1: float, x2: float, y2: float) -> str:
    """Draws a thin line of the grid."""
    paint = {"stroke": RULE, "stroke_width": 1, "stroke_opacity": 0.3, "class_": "rule"}
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **paint)


def hover_area(x: float, y: float, width: float, height: float, words: str) -> str:
    """Draws an invisible area that shows `words` while the pointer is over it."""
    box = {"x": x, "y": y, "width": width, "height": height}
    return element("rect", tooltip(words), **box, fill="none", pointer_events="all", class_="hit")


def grid(horizontal: Axis, vertical: Axis, x_label: str) -> list[str]:
    """Draws the ticks of both axes and the label of the x axis."""
    parts = []
    for tick in vertical.ticks:
        y = vertical(tick)
        parts += [rule(LEFT, y, WIDTH - RIGHT, y)]
        parts += [text(vertical.label(tick), LEFT - 5, y + 4, anchor="end")]
    for tick in horizontal.ticks:
        x = horizontal(tick)
        parts += [rule(x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 4)]
        parts += [text(horizontal.label(tick), x, HEIGHT - BOTTOM + 15, anchor="middle")]
    label = f"{x_label} (x logarithmic)" if horizontal.log else x_label
    return [*parts, text(label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, anchor="middle")]


def reference_line(name: str, value: float, vertical: Axis) -> str:
    """Draws a dashed horizontal line with its name."""
    y = vertical(value)
    ends = {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": y, "y2": y}
    line = element("line", **ends, **DASHED)
    return line + text(name, WIDTH - RIGHT, y - 3, anchor="end", font_size=10)


def legend_entry(name: str, look: int, y: float) -> str:
    """Draws the look of a group with its name."""
    return Look(look).key(4, y + 6) + text(cut(name, 48), 42, y + 10)
