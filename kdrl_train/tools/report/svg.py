"""Writes SVG elements as text, axes with round ticks, numbers, and the look of a group.

Colours are attributes that can be read on white and on black, so that a chart needs no page; the
style sheet of a page may set others by class.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

PALETTE = (
    "#2f7ed8",
    "#c96a00",
    "#0e9268",
    "#b0579f",
    "#8a7a1f",
    "#d1495b",
    "#5d7f95",
    "#7a68d8",
)
"""Colours of the groups, in their order. Contrast at least 3 with white and with #14171c."""
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "5 2 1 2 1 2", "12 3", "1 2", "4 4")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "plus", "down", "ring")
INK, RULE = "#7b828c", "#7b828c"
"""Colours of texts and of lines."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def element(name: str, content: str = "", /, **attributes: Any) -> str:
    """Writes one element; stroke_width becomes stroke-width, class_ class; None is left out.

    content: markup; `text` writes plain text.
    """
    parts = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    return f"<{name}{''.join(parts)}>{content}</{name}>"


def _attribute(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def text(content: str, x: float, y: float, *, anchor: str = "start", **attributes: Any) -> str:
    """Writes a text; anchor says whether it starts, has its middle, or ends at x."""
    attributes = {"class_": "ink", "fill": INK, "font_size": 11} | attributes
    return element("text", escape(content), x=x, y=y, text_anchor=anchor, **attributes)


def document(
    title: str, description: str, width: float, height: float, parts: Iterable[str]
) -> str:
    """Writes an <svg> with a title and a description for screen readers."""
    labels = element("title", escape(title)) + element("desc", escape(description))
    return element(
        "svg",
        labels + "".join(parts),
        xmlns="http://www.w3.org/2000/svg",
        role="img",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        font_family=FONT,
    )


def tooltip(words: str) -> str:
    """Writes a <title>, which browsers show while the pointer is over its element."""
    return element("title", escape(words))


def number(value: float | None, *, sign: str = "") -> str:
    """Writes three significant digits: 0.512, 12,345, 2.5e-6; "-" for None and infinite numbers.

    sign: "+" writes the sign of positive numbers too.
    """
    if value is None or not math.isfinite(value):
        return "-"
    size = abs(value)
    if 100 <= size < 1e9:
        return f"{value:{sign},.0f}"
    return f"{value:{sign}z.3g}".replace("e-0", "e-").replace("e+", "e").replace("e0", "e")


def cut(name: str, most: int) -> str:
    """Cuts a name to at most `most` characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Lists at most `most` round numbers in [low, high]; their distance is 1, 2 or 5 times a power
    of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = (s * power for s in (1, 2, 5, 10, 20))
    step = next(s for s in steps if math.floor(high / s) - math.ceil(low / s) + 1 <= most)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Lists at most `most` powers of ten in [low, high], with 2 and 5 times them if few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        inside = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
        if len(inside) <= most:
            return inside
    return inside[:: math.ceil(len(inside) / most)]


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps data to places in the drawing, linearly or logarithmically."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def fit(
        cls,
        values: Sequence[float],
        start: float,
        end: float,
        *,
        log: bool = False,
        room: float = 0,
    ) -> "Axis":
        """Makes an axis around finite values (above 0 if log), with a share `room` of free space at
        each end; around equal values it has a range too."""
        inside = [v for v in values if v > 0] if log else list(values)
        low, high = min(inside, default=1.0), max(inside, default=1.0)
        if log:
            factor = max((high / low) ** room, 1.0 if high > low else 1.5)
            return cls(low / factor, high * factor, start, end, log=True)
        if high - low <= 1e-9 * max(abs(high), abs(low)):
            size = 0.1 * abs(high) or 1.0
            return cls(low - size, high + size, start, end)
        extra = room * (high - low)
        return cls(low - extra, high + extra, start, end)

    def __call__(self, value: float) -> float:
        """Returns the place of a value; values outside are placed at the ends."""
        a, b, v = self.low, self.high, value
        if self.log:
            a, b, v = math.log(a), math.log(b), math.log(max(v, self.low))
        share = min(max((v - a) / (b - a), 0.0), 1.0)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Lists round numbers on the axis."""
        return (log_ticks if self.log else ticks)(self.low, self.high)

    def label(self, value: float) -> str:
        """Writes a tick in no more digits than tell it from the next one."""
        if value == 0:
            return "0"
        digits, marks = 6, self.ticks
        if not self.log and len(marks) > 1:
            last = math.floor(math.log10(marks[1] - marks[0]) + 1e-6)
            digits = max(digits, math.floor(math.log10(abs(value)) + 1e-6) - last + 1)
        if not 1e-3 <= abs(value) < 1e6:
            mantissa, power = f"{value:.{digits - 1}e}".split("e")
            return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
        return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def marker(kind: str, x: float, y: float, color: str, size: float = 3.2) -> str:
    """Draws the mark of a group around (x, y)."""
    s, paint = size, {"fill": color, "stroke": color, "stroke_width": 1}
    if kind in ("circle", "ring"):
        if kind == "ring":
            paint = {"fill": "none", "stroke": color, "stroke_width": 1.6}
        return element("circle", cx=x, cy=y, r=s, **paint)
    if kind in ("cross", "plus"):
        d = s * (0.8 if kind == "cross" else 1.15)
        a, b = (f"M{x - d:.1f} {y - d:.1f}L{x + d:.1f} {y + d:.1f}", f"M{x - d:.1f} {y + d:.1f}")
        path = f"{a}{b}L{x + d:.1f} {y - d:.1f}"
        if kind == "plus":
            path = f"M{x - d:.1f} {y:.1f}H{x + d:.1f}M{x:.1f} {y - d:.1f}V{y + d:.1f}"
        return element("path", d=path, fill="none", stroke=color, stroke_width=2)
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "triangle": ((-1.2, 1), (1.2, 1), (0, -1.2)),
        "down": ((-1.2, -1), (1.2, -1), (0, 1.2)),
        "diamond": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
    }[kind]
    points = " ".join(f"{x + dx * s * 0.9:.1f},{y + dy * s * 0.9:.1f}" for dx, dy in corners)
    return element("polygon", points=points, **paint)


@dataclass(frozen=True, slots=True)
class Look:
    """Says how the group of an index is drawn: groups differ in colour, dashes and mark."""

    index: int

    @property
    def color(self) -> str:
        """Returns a colour of PALETTE."""
        return PALETTE[self.index % len(PALETTE)]

    @property
    def dash(self) -> str:
        """Returns the dashes of a line; groups of the same colour have other dashes."""
        return DASHES[(self.index + self.index // len(PALETTE)) % len(DASHES)]

    @property
    def marker(self) -> str:
        """Returns one of MARKERS; groups of the same colour have other marks."""
        return MARKERS[(self.index + 3 * (self.index // len(PALETTE))) % len(MARKERS)]

    def line(self, points: Sequence[tuple[float, float]]) -> str:
        """Draws a line through places of the drawing."""
        place = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        paint = {"fill": "none", "stroke": self.color, "stroke_width": 1.8}
        return element(
            "polyline", points=place, stroke_linejoin="round", stroke_dasharray=self.dash, **paint
        )

    def mark(self, x: float, y: float) -> str:
        """Draws the mark of the group at (x, y)."""
        return marker(self.marker, x, y, self.color)

    def key(self, x: float, y: float) -> str:
        """Draws line and mark for a legend, 30 wide."""
        return self.line([(x, y), (x + 30, y)]) + self.mark(x + 15, y)
