"""Draws problems that differ, and puts slips in their solutions, for all tasks."""

import random
from collections.abc import Callable, Iterable
from typing import TypeVar

Problem = TypeVar("Problem")

SLIPS = (-10, -2, -1, 1, 2, 10)
"""Numbers that a slip adds to the result of a step."""
TRIES_PER_ROW = 200
"""Draws without a new problem after which no more problems are expected."""


def distinct(
    n: int, draw: Callable[[], tuple[str, Problem] | None], space: object
) -> dict[str, Problem]:
    """Draws n different questions with their problems, in the order of their first draw.

    Args:
        draw: returns a random (question, problem), or None if it has drawn no problem.
        space: the configuration that is drawn from, for the error message.
    Raises: ValueError if TRIES_PER_ROW successive draws bring no new question.
    """
    problems: dict[str, Problem] = {}
    for _ in range(n):
        for _ in range(TRIES_PER_ROW):
            drawn = draw()
            if drawn is not None and drawn[0] not in problems:
                problems[drawn[0]] = drawn[1]
                break
        else:
            raise ValueError(
                f"n must be at most the number of different problems of {space}, got {n}: "
                f"no new one after {len(problems)}; raise one of its maxima"
            )
    return problems


def apply(left: int, operator: str, right: int) -> int:
    """Returns left + right, left - right or left * right."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def slip(
    rng: random.Random, right: int, go_on: Callable[[int], Iterable[int]], max_total: int
) -> int:
    """Returns a wrong result of a step; the right one if no wrong one keeps all in [1, max_total].

    Args:
        go_on: maps the step's result to the results of the steps after it.
    """
    wrong = [
        end
        for end in (right + off for off in SLIPS)
        if all(1 <= result <= max_total for result in (end, *go_on(end)))
    ]
    return rng.choice(wrong) if wrong else right


def check_slips(slips: float) -> None:
    """Raises ValueError unless the chance of a slip is in [0, 1]."""
    if not 0 <= slips <= 1:
        raise ValueError(f"slips must be in [0, 1], got {slips}")
