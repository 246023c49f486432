"""Defines a table, how its numbers are written, and how it is written in markdown."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bench.ops import FLOORS, OPS_BY_NAME
from bench.reporting.figures import ProviderFigures, ShapeFigures, Spread
from bench.results_file import BOTH_OURS, SKETCH

MARK = "▼"
"""Mark of a figure to our disadvantage: better than ours, or ours beyond its target."""
SLACK_BYTES = 0.5e6
"""Differences of memory up to this size are not marked."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table."""

    text: str
    mark: bool = False
    """Whether the figure is to our disadvantage."""

    def __str__(self) -> str:
        return f"{self.text} {MARK}" if self.mark else self.text


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of a table; a status stands in the place of all cells but the first."""

    cells: tuple[Cell, ...]
    status: str | None = None
    kind: str = "peer"
    """"ours", "floor" or "peer"."""
    group: str = ""
    """Name of the row's group, such as an operation; rows of a group follow each other."""


@dataclass(frozen=True, slots=True)
class FigureTable:
    """A table of figures, with its caption."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()
    group_name: str | None = None
    """Heading of the groups; None: the rows have none."""

    def groups(self) -> list[tuple[str, list[TableRow]]]:
        """Return the rows by group, in order."""
        rows_by_group: dict[str, list[TableRow]] = {}
        for row in self.rows:
            rows_by_group.setdefault(row.group, []).append(row)
        return list(rows_by_group.items())


def number(x: float | None) -> str:
    """Write a number with three or four significant digits, thousands with a comma."""
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
    """Write a ratio, with a third decimal where two would hide on which side of 1 it is."""
    if x is None:
        return ""
    return f"{x:.3f}" if 0.995 <= x < 1.005 and x != 1 else f"{x:.2f}" if x < 100 else number(x)


def ratio_text(ratio: Spread | None) -> str:
    """Write the median of a ratio, with "≈" where it is not one over rounds."""
    return "" if ratio is None else ("" if ratio.paired else "≈ ") + times(ratio.median)


def quartiles(spread: Spread | None) -> str:
    """Write the median (lower - upper quartile)."""
    if spread is None:
        return ""
    return f"{number(spread.median)} ({number(spread.low)}-{number(spread.high)})"


def median(spread: Spread | None) -> str:
    """Write the median, or nothing."""
    return "" if spread is None else number(spread.median)


def megabytes(size: float | None) -> str:
    """Write a size in MB of 10**6 bytes."""
    return "" if size is None else number(size / 1e6)


def percent(share: float | None) -> str:
    """Write a share in percent."""
    return "" if share is None else f"{100 * share:.1f}%"


def one_line(text: str) -> str:
    """Put a status, which may quote another library's error, into one line."""
    return " ".join(text.split())


def error(case: ProviderFigures | None, name: str, of: str) -> float | None:
    """Return one error of a case, relative to the largest exact value."""
    return case.errors.get(name, {}).get(of) if case else None


def scientific(x: float | None) -> str:
    """Write an error with two digits."""
    return "" if x is None else f"{x:.1e}"


def is_less(a: float | None, b: float | None) -> bool:
    """Say whether both exist and a < b."""
    return a is not None and b is not None and a < b


def holds_less(a: float | None, b: float | None) -> bool:
    """Say whether both exist and a is less than b by more than SLACK_BYTES."""
    return a is not None and b is not None and a < b - SLACK_BYTES


def target(group: ShapeFigures, op: str, provider: str) -> float | None:
    """Return the highest ratio to the floor that the design of ours allows; stated for "cpu"."""
    known = OPS_BY_NAME.get(op)
    if known is None or group.shape != "cpu" or provider not in BOTH_OURS:
        return None
    return known.sketch_bar if provider == SKETCH else known.bar


def misses(group: ShapeFigures, case: ProviderFigures | None) -> bool:
    """Say whether the case is ours and above its target."""
    if case is None or case.per_floor is None:
        return False
    return is_less(target(group, case.op, case.provider), case.per_floor.median)


def law(axis: str, power: float) -> str:
    """Write a power law, such as N^0.98."""
    return f"{axis}^{round(power, 2) + 0.0:.2f}"  # no -0.00


def label(provider: str, version: str | None) -> str:
    """Write provider (version)."""
    return f"{provider} ({version})" if version else provider


def name_of(op: str, provider: str) -> str:
    """Name an operation of ours, exact or with a sketch."""
    return f"{op}, sketch" if provider == SKETCH else op


def kind_of(provider: str) -> str:
    """Return the kind of a provider's row."""
    return "ours" if provider in BOTH_OURS else "floor" if provider in FLOORS else "peer"


def describe(sizes: dict[str, int], dtype: str) -> str:
    """Write the sizes of a shape."""
    return ", ".join([*(f"{name} = {size:,}" for name, size in sizes.items()), dtype])


def markdown(table: FigureTable, heading: str = "###") -> str:
    """Write title, table and notes in markdown."""
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
