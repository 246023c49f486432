"""Makes arithmetic problems: an expression is evaluated, one operation a line."""

import itertools
import random
from dataclasses import replace
from functools import partial
from typing import Annotated

from pydantic import Field

from kdrl_train.settings import NaturalInt, PositiveInt, settings
from kdrl_train.tools.toy.solved_problems import apply, check_slips, distinct, slip

Operation = tuple[str, int]  # operator, operand
Problem = tuple[int, list[Operation]]  # first number, operations on it


@settings
class ArithmeticConfig:
    """Which expressions are drawn."""

    min_steps: PositiveInt = 2
    """Smallest number of operations in an expression."""
    max_steps: PositiveInt = 3
    """Largest number of operations in an expression."""
    max_operand: Annotated[PositiveInt, Field(ge=2)] = 9
    """Largest number in an expression."""
    max_total: PositiveInt = 99
    """Largest intermediate result; the smallest is 1."""
    beyond: NaturalInt = 0
    """Every expression has a number larger than this; 0: any expression."""

    def __post_init__(self) -> None:
        if self.min_steps > self.max_steps:
            raise ValueError(
                "min_steps must be at most max_steps, got "
                f"min_steps = {self.min_steps}, max_steps = {self.max_steps}"
            )
        if self.max_total < self.max_operand:
            raise ValueError(
                f"max_total must be at least max_operand = {self.max_operand}, got {self.max_total}"
            )
        if self.beyond >= self.max_operand:
            raise ValueError(
                f"beyond must be less than max_operand = {self.max_operand}, got {self.beyond}"
            )

    def longer(self) -> "ArithmeticConfig":
        """Returns a harder configuration: one or two operations more than the longest."""
        return replace(self, min_steps=self.max_steps + 1, max_steps=self.max_steps + 2)

    def larger(self) -> "ArithmeticConfig":
        """Returns a harder configuration: numbers up to twice as large, and one of them larger
        than any number here."""
        return replace(
            self,
            max_operand=2 * self.max_operand,
            max_total=max(self.max_total, 2 * self.max_operand),
            beyond=self.max_operand,
        )


LEVELS = {
    "easy": ArithmeticConfig(min_steps=2, max_steps=2),
    "medium": ArithmeticConfig(),
    "hard": ArithmeticConfig(min_steps=3, max_steps=4, max_operand=19, max_total=199),
}
"""Named difficulty levels; "medium" is the default configuration."""


def make_arithmetic(
    n: int, seed: int, config: ArithmeticConfig | None = None, slips: float = 0.0
) -> list[dict[str, str]]:
    """Makes n different problems of several steps, each with a worked solution.

    {"question": "(3+4)*6-5=?", "solution": "3+4=7\\n7*6=42\\n42-5=37\\n#### 37", "answer": "37"}

    Args:
        n: number of rows. All questions differ, so rows[:k] and rows[k:] share no problem.
        seed: rows are a function of (seed, config, slips); a smaller n gives a prefix of them.
        config: which expressions; None: the default.
        slips: chance in [0, 1] that the result of a step is off by 1, 2 or 10. The solution goes on
            with the wrong result; questions and answers are those of slips = 0. A step stays right
            if every slip would lead to a result outside [1, max_total].
    Returns: n dicts of question, solution and answer. Questions are evaluated by the usual rules
        of precedence; numbers are whole and positive throughout.
    Raises: ValueError if the configuration has fewer than n different expressions, or slips is not
        in [0, 1].
    """
    check_slips(slips)
    config = config or ArithmeticConfig()
    rng, slip_rng = random.Random(seed), random.Random(f"{seed}/slips")
    problems = distinct(n, lambda: _draw(rng, config), config)
    return [
        {
            "question": question,
            "solution": _solution(start, operations, slip_rng, slips, config),
            "answer": str(_results(start, operations)[-1]),
        }
        for question, (start, operations) in problems.items()
    ]


def _draw(rng: random.Random, config: ArithmeticConfig) -> tuple[str, Problem] | None:
    """Draws a question and its problem; returns None if no number is larger than `beyond`."""
    start = total = rng.randint(1, config.max_operand)
    operations: list[Operation] = []
    for _ in range(rng.randint(config.min_steps, config.max_steps)):
        room = min(config.max_operand, config.max_total - total)
        largest_factor = min(config.max_operand, config.max_total // total)
        operators = "+" * 2 * (room >= 1) + "-" * 2 * (total >= 2) + "*" * (largest_factor >= 2)
        operator = rng.choice(operators)  # a product, the hardest to learn, is half as frequent
        if operator == "+":
            operand = rng.randint(1, room)
        elif operator == "-":
            operand = rng.randint(1, min(config.max_operand, total - 1))
        else:
            operand = rng.randint(2, largest_factor)
        operations.append((operator, operand))
        total = apply(total, operator, operand)
    if max(start, *(operand for _, operand in operations)) <= config.beyond:
        return None
    return _expression(start, operations) + "=?", (start, operations)


def _solution(
    end: int,
    operations: list[Operation],
    rng: random.Random,
    slips: float,
    config: ArithmeticConfig,
) -> str:
    """Writes the steps and their end; each step is off with probability `slips`."""
    steps = []
    for i, (operator, operand) in enumerate(operations):
        result = apply(end, operator, operand)
        if rng.random() < slips:
            go_on = partial(_results, operations=operations[i + 1 :])
            result = slip(rng, result, go_on, config.max_total)
        steps.append(f"{end}{operator}{operand}={result}\n")
        end = result
    return "".join(steps) + f"#### {end}"


def _results(start: int, operations: list[Operation]) -> list[int]:
    """Returns the result after each operation."""
    steps = itertools.accumulate(operations, lambda total, step: apply(total, *step), initial=start)
    return list(steps)[1:]


def _expression(start: int, operations: list[Operation]) -> str:
    """Writes the expression; a product of a sum needs parentheses."""
    text, is_sum = str(start), False
    for operator, operand in operations:
        if operator == "*" and is_sum:
            text = f"({text})"
        text, is_sum = f"{text}{operator}{operand}", operator != "*"
    return text
