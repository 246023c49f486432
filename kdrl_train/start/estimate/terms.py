"""One line of a prediction: a product of named numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Factor = tuple[float, str]
"""A number and what it counts."""


@dataclass(frozen=True, slots=True)
class Term:
    """One line of a prediction."""

    name: str
    value: float
    """Bytes of one GPU, or seconds of one step."""
    formula: str
    when: tuple[str, ...]
    """Moments at which these bytes are held, or the part of the step these seconds belong to."""
    remedy: str = ""
    """What makes it smaller."""


def product(
    name: str, when: Sequence[str], factors: Sequence[Factor], over: Factor = (1, ""), **more: str
) -> Term:
    """The product of `factors` over one number, with the formula that says so."""
    value = math.prod(number for number, _ in factors) / over[0]
    formula = " · ".join(f"{number_text(number)} {unit}" for number, unit in factors)
    if over[1]:
        formula += f" / {number_text(over[0])} {over[1]}"
    return Term(name, value, formula, tuple(when), **more)


def number_text(number: float) -> str:
    """A whole or large number in full, another with four digits."""
    return f"{number:,.0f}" if isinstance(number, int) or number >= 1e4 else f"{number:,.4g}"
