"""A table: how its numbers are written, and how it is written in markdown."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bench.ops import FLOORS, OPS_BY_NAME
from bench.reporting.figures import Case, Group, Spread
from bench.results_file import OURS

MARK = "▼"
"""Beside a figure to our disadvantage: better than ours, or ours beyond its target."""
SLACK_BYTES = 0.5e6
"""Differences of memory that say nothing."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Text of a cell."""

    text: str
    mark: bool = False
    """To our disadvantage."""

    def __str__(self) -> str:
        return f"{self.text} {MARK}" if self.mark else self.text


@dataclass(frozen=True, slots=True)
class Row:
    """Cells of a row; where there is a status, it stands in place of all cells but the first."""

    cells: tuple[Cell, ...]
    status: str | None = None
    kind: str = "peer"
    """"ours", "floor" or "peer"."""
    group: str = ""
    """Rows of one group follow each other: an operation."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table with its caption."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    group_name: str | None = None
    """What the groups are; None: rows have none."""

    def groups(self) -> list[tuple[str, list[Row]]]:
        """Rows by group, in their order."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return list(found.items())


def number(x: float | None) -> str:
    """Three or four significant digits, thousands with a comma."""
    if x is None:
        return ""
    size = abs(x)
    if size == 0 or size < 1e-3:
        return "0" if size == 0 else f"{x:.1e}"
    if size >= 1e4:
        return f"{round(x, 3 - math.floor(math.log10(size))):,.0f}"
    if size < 0.9995:
        return f"{x:#.3g}"
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{x:,.{decimals}f}"


def times(x: float | None) -> str:
    """A ratio; with a third decimal where two would hide on which side of 1 it is."""
    if x is None:
        return ""
    return f"{x:.3f}" if 0.995 <= x < 1.005 and x != 1 else f"{x:.2f}" if x < 100 else number(x)


def ratio_text(ratio: Spread | None) -> str:
    """The median; "≈" where it is not one over rounds."""
    return "" if ratio is None else ("" if ratio.paired else "≈ ") + times(ratio.median)


def quartiles(found: Spread | None) -> str:
    """Median (lower - upper quartile)."""
    if found is None:
        return ""
    return f"{number(found.median)} ({number(found.low)}-{number(found.high)})"


def median(found: Spread | None) -> str:
    """The median, if there is one."""
    return "" if found is None else number(found.median)


def megabytes(size: float | None) -> str:
    """MB of 10**6 bytes."""
    return "" if size is None else number(size / 1e6)


def percent(share: float | None) -> str:
    """A share of 1."""
    return "" if share is None else f"{100 * share:.1f}%"


def one_line(text: str) -> str:
    """A status may quote another library's error."""
    return " ".join(text.split())


def error(case: Case | None, name: str, of: str) -> float | None:
    """One error of a case, relative to the largest exact value."""
    return case.errors.get(name, {}).get(of) if case else None


def scientific(x: float | None) -> str:
    """An error: two digits."""
    return "" if x is None else f"{x:.1e}"


def is_less(a: float | None, b: float | None) -> bool:
    """a < b, and both exist."""
    return a is not None and b is not None and a < b


def holds_less(a: float | None, b: float | None) -> bool:
    """a < b, both bytes that exist, by more than a process's heap hides."""
    return a is not None and b is not None and a < b - SLACK_BYTES


def target(group: Group, op: str) -> float | None:
    """Highest ratio to the floor that the design allows; it is stated for the shape "cpu"."""
    known = OPS_BY_NAME.get(op)
    return known.bar if known and group.shape == "cpu" else None


def misses(group: Group, case: Case | None) -> bool:
    """Ours, and above its target."""
    if case is None or case.provider != OURS or case.per_floor is None:
        return False
    return is_less(target(group, case.op), case.per_floor.median)


def law(axis: str, power: float) -> str:
    """N^0.98."""
    return f"{axis}^{round(power, 2) + 0.0:.2f}"  # no -0.00


def label(provider: str, version: str | None) -> str:
    """provider (version)."""
    return f"{provider} ({version})" if version else provider


def kind_of(provider: str) -> str:
    """Of a row."""
    return "ours" if provider == OURS else "floor" if provider in FLOORS else "peer"


def describe(sizes: dict[str, int], dtype: str) -> str:
    """Sizes of a shape."""
    return ", ".join([*(f"{name} = {size:,}" for name, size in sizes.items()), dtype])


def markdown(table: Table, heading: str = "###") -> str:
    """Title, table, notes."""
    first = (table.group_name,) if table.group_name else ()
    columns = first + table.columns
    lines = [f"{heading} {table.title}", "", _line(columns), _line(["---"] * len(columns))]
    before = None
    for row in table.rows:
        cells = [str(cell) for cell in row.cells]
        if row.status is not None:
            cells = [cells[0], row.status, *[""] * (len(table.columns) - 2)]
        if row.kind == "ours":
            cells = [f"**{text}**" if text else "" for text in cells]
        group = [row.group if row.group != before else ""] if first else []
        lines.append(_line(group + cells))
        before = row.group
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"
