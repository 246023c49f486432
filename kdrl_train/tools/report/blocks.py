"""What a page is made of. Every text is escaped by the page; an svg comes from charts.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from kdrl_train.tools.report.svg import Look, element, number

Cell = str | float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts and numbers; a number is written in three digits, None as "-".

    The first column names its row. A text of several lines keeps them, so that an interval can
    stand below its value.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    @property
    def cells(self) -> list[list[tuple[str, bool]]]:
        """(text, whether it is kept from wrapping) of each row."""
        return [[_cell(value) for value in row] for row in self.rows]


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart as charts.py makes it; figures that follow each other stand side by side."""

    kind: ClassVar[str] = "figure"
    title: str
    """Where the chart has no heading of its own; else empty."""
    svg: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph."""

    kind: ClassVar[str] = "note"
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Legend:
    """Which look is which group, for the figures that follow."""

    kind: ClassVar[str] = "legend"
    names: Sequence[str]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """(svg of 38 x 12, name) of each."""
        looks = [Look(i).key(4, 6) for i in range(len(self.names))]
        size = {"viewBox": "0 0 38 12", "width": 38, "height": 12, "aria_hidden": "true"}
        pairs = zip(looks, self.names, strict=True)
        return [(element("svg", look, **size), name) for look, name in pairs]


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a completion with its tints; words: what a pointer is told."""

    text: str
    classes: str
    words: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion."""

    group: str
    facts: Sequence[tuple[str, str]]
    right: bool | None
    tokens: Sequence[Token]
    rest: str = ""
    """What is not tinted, at the end."""
    strongest: Sequence[tuple[str, str]] = ()
    """(token, l) of the largest gaps."""


@dataclass(frozen=True, slots=True)
class Tints:
    """What the looks of tokens mean: (classes, words) of each."""

    kind: ClassVar[str] = "tints"
    looks: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Samples:
    """Completions of one prompt, side by side."""

    kind: ClassVar[str] = "samples"
    title: str
    prompt: str
    samples: Sequence[Sample]


@dataclass(frozen=True, slots=True)
class Folded:
    """Blocks that open on request."""

    kind: ClassVar[str] = "folded"
    title: str
    blocks: Sequence["Block"]


Block = Table | Figure | Note | Legend | Tints | Samples | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with an anchor, and what stands under it."""

    id: str
    title: str
    blocks: Sequence[Block] = field(default_factory=list)


def _cell(value: Cell) -> tuple[str, bool]:
    if isinstance(value, str):
        return value, "\n" in value
    return number(value), True
