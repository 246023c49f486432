"""Makes Countdown problems: reach a target by + - and *, using each number exactly once."""

import random
import re
from dataclasses import replace
from functools import partial
from typing import Annotated

from pydantic import Field

from kdrl_train.rollouts.rewards import UnparseableError
from kdrl_train.settings import NaturalInt, PositiveInt, settings
from kdrl_train.tools.toy.solved_problems import apply, check_slips, distinct, slip

Step = tuple[int, str, int]  # index of the left number, operator, index of the right number
Problem = tuple[list[int], list[Step]]  # numbers; the results of steps are numbered after them

_STEP = re.compile(r"([0-9]{1,9})([-+*])([0-9]{1,9})=([0-9]{1,9})")
_END = re.compile(r"#### ?([0-9]{1,9})")
_ANSWER = re.compile(r"([0-9]{1,9}(?:,[0-9]{1,9})*)->([0-9]{1,9})")


@settings
class CountdownConfig:
    """Which problems are drawn."""

    min_numbers: Annotated[PositiveInt, Field(ge=2)] = 3
    """Smallest count of numbers in a problem."""
    max_numbers: PositiveInt = 3
    """Largest count of numbers in a problem."""
    max_number: Annotated[PositiveInt, Field(ge=2)] = 20
    """Largest given number."""
    max_total: PositiveInt = 50
    """Largest target and intermediate result; the smallest is 1."""
    beyond: NaturalInt = 0
    """Every problem gives a number larger than this; 0: any problem."""

    def __post_init__(self) -> None:
        if self.min_numbers > self.max_numbers:
            raise ValueError(
                "min_numbers must be at most max_numbers, got "
                f"min_numbers = {self.min_numbers}, max_numbers = {self.max_numbers}"
            )
        if self.max_total < self.max_number:
            raise ValueError(
                f"max_total must be at least max_number = {self.max_number}, got {self.max_total}"
            )
        if self.beyond >= self.max_number:
            raise ValueError(
                f"beyond must be less than max_number = {self.max_number}, got {self.beyond}"
            )

    def longer(self) -> "CountdownConfig":
        """Returns a harder configuration: one number more than the longest problem."""
        return replace(self, min_numbers=self.max_numbers + 1, max_numbers=self.max_numbers + 1)

    def larger(self) -> "CountdownConfig":
        """Returns a harder configuration: numbers up to twice as large, and one of them larger
        than any number here."""
        return replace(
            self,
            max_number=2 * self.max_number,
            max_total=max(self.max_total, 2 * self.max_number),
            beyond=self.max_number,
        )


LEVELS = {
    "easy": CountdownConfig(max_number=15),
    "medium": CountdownConfig(),
    "hard": CountdownConfig(max_numbers=4, max_total=99),
}
"""Named difficulty levels; "medium" is the default configuration."""


def make_countdown(
    n: int, seed: int, config: CountdownConfig | None = None, slips: float = 0.0
) -> list[dict[str, str]]:
    """Makes n different problems, each with one derivation of the target.

    {"question": "3,5,7->26", "solution": "7*3=21\\n21+5=26\\n#### 26", "answer": "3,5,7->26"}

    The numbers of a question ascend, so that no problem is repeated in another order. Every correct
    derivation is accepted, so the answer is what `countdown_reward` needs: the question.

    Args:
        n: number of rows. All questions differ, so rows[:k] and rows[k:] share no problem.
        seed: rows are a function of (seed, config, slips); a smaller n gives a prefix of them.
        config: which problems; None: the default.
        slips: chance in [0, 1] that the result of a step is off by 1, 2 or 10. The solution goes on
            with the wrong result; questions and answers are those of slips = 0. A step stays right
            if every slip would lead to a result outside [1, max_total].
    Returns: n dicts of question, solution and answer; every result is in [1, max_total].
    Raises: ValueError if the configuration has fewer than n different problems, or slips is not in
        [0, 1].
    """
    check_slips(slips)
    config = config or CountdownConfig()
    rng, slip_rng = random.Random(seed), random.Random(f"{seed}/slips")
    problems = distinct(n, lambda: _draw(rng, config), config)
    return [
        {
            "question": question,
            "solution": _solution(*problem, slip_rng, slips, config),
            "answer": question,
        }
        for question, problem in problems.items()
    ]


def countdown_reward(completion: str, answer: str) -> float:
    """Returns 1.0 if the steps use each number exactly once and reach the target, else 0.0.

    A completion has steps like "7*3=21", one a line, then "#### 26". Each step takes away two of
    the numbers and adds its result; at the end one number is left, which must be the target.

    Args:
        completion: the policy's text.
        answer: numbers and target of a row, "3,5,7->26".
    Raises: UnparseableError if the completion has another form, a negative number, or a number of
        more than 9 digits; ValueError if the answer cannot be read.
    """
    gold = _ANSWER.fullmatch(answer.strip())
    if gold is None:
        raise ValueError(
            f"answer must be numbers and a target like '3,5,7->26', got {answer[:80]!r}: correct "
            "the row or data.answer_column, or set another reward.function"
        )
    steps, end = _read(completion)
    numbers, target = [int(number) for number in gold[1].split(",")], int(gold[2])
    for left, operator, right, result in steps:
        for used in (left, right):
            if used not in numbers:
                return 0.0
            numbers.remove(used)
        if apply(left, operator, right) != result:
            return 0.0
        numbers.append(result)
    return float(numbers == [target] and end == target)


def _derivation(completion: str) -> str | None:
    """Returns what a completion votes for: its whole text, since the steps are the answer."""
    try:
        _read(completion)
    except UnparseableError:
        return None
    return completion.strip()


countdown_reward.answer = _derivation  # type: ignore[attr-defined] # see rewards.load_answer


def _read(completion: str) -> tuple[list[tuple[int, str, int, int]], int]:
    """Reads the steps (left, operator, right, result) and the end. Raises UnparseableError."""
    *lines, last = completion.strip().split("\n")
    end = _END.fullmatch(last)
    steps = [_STEP.fullmatch(line) for line in lines]
    if end is None or None in steps:
        raise UnparseableError("completion must be steps like 7*3=21, one a line, then #### 21")
    parts = [step.groups() for step in steps if step is not None]
    return [(int(a), operator, int(b), int(c)) for a, operator, b, c in parts], int(end[1])


def _draw(rng: random.Random, config: CountdownConfig) -> tuple[str, Problem] | None:
    """Draws a question with a derivation; returns None if the drawn numbers allow none."""
    count = rng.randint(config.min_numbers, config.max_numbers)
    numbers = sorted(rng.randint(1, config.max_number) for _ in range(count))
    if numbers[-1] <= config.beyond:
        return None
    values, steps, free = list(numbers), [], list(range(count))
    while len(free) > 1:
        pair = rng.sample(free, 2)
        left, right = sorted(pair, key=lambda index: (-values[index], index))  # the larger first
        operators = [
            operator
            for operator in "++--*"  # a product, the hardest to find, is half as frequent
            if 1 <= apply(values[left], operator, values[right]) <= config.max_total
            and not (operator == "*" and values[right] == 1)
        ]
        if not operators:
            return None
        operator = rng.choice(operators)
        steps.append((left, operator, right))
        free = [index for index in free if index not in pair] + [len(values)]
        values.append(apply(values[left], operator, values[right]))
    return f"{','.join(map(str, numbers))}->{values[-1]}", (numbers, steps)


def _solution(
    numbers: list[int],
    steps: list[Step],
    rng: random.Random,
    slips: float,
    config: CountdownConfig,
) -> str:
    """Writes the steps and their end; each step is off with probability `slips`."""
    values, lines = list(numbers), []
    for i, (left, operator, right) in enumerate(steps):
        result = apply(values[left], operator, values[right])
        if rng.random() < slips:
            result = slip(rng, result, partial(_results, values, steps[i + 1 :]), config.max_total)
        lines.append(f"{values[left]}{operator}{values[right]}={result}\n")
        values.append(result)
    return "".join(lines) + f"#### {values[-1]}"


def _results(values: list[int], rest: list[Step], result: int) -> list[int]:
    """Returns the results of the steps `rest`, if the step before them gave `result`."""
    known = [*values, result]
    for left, operator, right in rest:
        known.append(apply(known[left], operator, known[right]))
    return known[len(values) + 1 :]
