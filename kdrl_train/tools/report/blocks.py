"""Defines the blocks of a page. The page escapes every text; an svg comes from charts.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from kdrl_train.tools.report.svg import Look, element, number

Cell = str | float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Is a table of texts and numbers; a number is written in three digits, None as "-".

    The first column names its row. A text keeps its line breaks, so that an interval can be
    written below its value.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    @property
    def cells(self) -> list[list[tuple[str, bool]]]:
        """Returns (text, whether it must not wrap) for each cell of each row."""
        return [[_cell(value) for value in row] for row in self.rows]


@dataclass(frozen=True, slots=True)
class Figure:
    """Is a chart made by charts.py; the page shows consecutive figures side by side."""

    kind: ClassVar[str] = "figure"
    title: str
    """Heading; empty if the chart draws one."""
    svg: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """Is a paragraph."""

    kind: ClassVar[str] = "note"
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Legend:
    """Says which look is which group, for the figures that follow."""

    kind: ClassVar[str] = "legend"
    names: Sequence[str]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Returns (svg of 38 x 12, name) for each group."""
        looks = [Look(i).key(4, 6) for i in range(len(self.names))]
        size = {"viewBox": "0 0 38 12", "width": 38, "height": 12, "aria_hidden": "true"}
        pairs = zip(looks, self.names, strict=True)
        return [(element("svg", look, **size), name) for look, name in pairs]


@dataclass(frozen=True, slots=True)
class Token:
    """Is one token of a completion with its colours; words: shown while the pointer is over it."""

    text: str
    classes: str
    words: str


@dataclass(frozen=True, slots=True)
class Sample:
    """Is one completion with its verdict and its coloured tokens."""

    group: str
    facts: Sequence[tuple[str, str]]
    right: bool | None
    tokens: Sequence[Token]
    rest: str = ""
    """The end of a long completion, without colours."""
    strongest: Sequence[tuple[str, str]] = ()
    """(token, l) where the teacher log-ratio l is largest in size."""


@dataclass(frozen=True, slots=True)
class TokenLegend:
    """Says what the colours of tokens mean: (classes, words) for each."""

    kind: ClassVar[str] = "token_legend"
    looks: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class PromptSamples:
    """Shows completions of one prompt side by side."""

    kind: ClassVar[str] = "samples"
    title: str
    prompt: str
    samples: Sequence[Sample]


@dataclass(frozen=True, slots=True)
class Folded:
    """Holds blocks that a reader can open."""

    kind: ClassVar[str] = "folded"
    title: str
    blocks: Sequence["Block"]


Block = Table | Figure | Note | Legend | TokenLegend | PromptSamples | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """Is a heading with an anchor, and its blocks."""

    id: str
    title: str
    blocks: Sequence[Block] = field(default_factory=list)


def _cell(value: Cell) -> tuple[str, bool]:
    if isinstance(value, str):
        return value, "\n" in value
    return number(value), True
