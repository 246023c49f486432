"""Synthetic tasks: problems with worked solutions, made from a seed, written as jsonl."""

import json
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TRIES_PER_ROW = 200  # draws before "no new problem" is called exhaustion


@dataclass(frozen=True, kw_only=True, slots=True)
class ArithmeticConfig:
    """Which expressions are drawn."""

    min_steps: int = 2
    """Fewest operations of an expression."""
    max_steps: int = 3
    """Most operations of an expression."""
    max_operand: int = 9
    """Largest number that stands in an expression."""
    max_total: int = 99
    """Largest intermediate result; the smallest is 1."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(
                "min_steps must be in [1, max_steps], got "
                f"min_steps = {self.min_steps}, max_steps = {self.max_steps}"
            )
        if self.max_operand < 2:
            raise ValueError(f"max_operand must be at least 2, got {self.max_operand}")
        if self.max_total < self.max_operand:
            raise ValueError(
                f"max_total must be at least max_operand = {self.max_operand}, got {self.max_total}"
            )


def make_arithmetic(
    n: int, seed: int, config: ArithmeticConfig | None = None
) -> list[dict[str, str]]:
    """n different problems of several-step arithmetic, each with its solution worked out.

    {"question": "(3+4)*6-5=?", "solution": "3+4=7\\n7*6=42\\n42-5=37\\n#### 37", "answer": "37"}

    Args:
        n: rows, all with different questions; so rows[:k] and rows[k:] share no problem.
        seed: rows are a function of (seed, config), and a smaller n gives a prefix of them.
        config: which expressions; None: the default.
    Returns: n dicts of question, solution and answer. Questions are evaluated by the usual rules
        of precedence; numbers are whole and positive throughout.
    Raises: ValueError if the configuration has too few different expressions for n rows.
    """
    config = config or ArithmeticConfig()
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    for _ in range(n):
        for _ in range(TRIES_PER_ROW):
            row = _draw(rng, config)
            if row["question"] not in rows:
                break
        else:
            raise ValueError(
                f"n must be at most the number of different problems of {config}, got {n}: "
                f"no new one after {len(rows)}; raise max_steps, max_operand or max_total"
            )
        rows[row["question"]] = row
    return list(rows.values())


def _draw(rng: random.Random, config: ArithmeticConfig) -> dict[str, str]:
    """One row. The running total stays in [1, max_total]."""
    total = rng.randint(1, config.max_operand)
    expression, is_sum, steps = str(total), False, []
    for _ in range(rng.randint(config.min_steps, config.max_steps)):
        room = min(config.max_operand, config.max_total - total)
        largest_factor = min(config.max_operand, config.max_total // total)
        operators = "+" * 2 * (room >= 1) + "-" * 2 * (total >= 2) + "*" * (largest_factor >= 2)
        operator = rng.choice(operators)  # a product, the hardest to learn, is half as frequent
        if operator == "+":
            operand = rng.randint(1, room)
            result = total + operand
        elif operator == "-":
            operand = rng.randint(1, min(config.max_operand, total - 1))
            result = total - operand
        else:
            operand = rng.randint(2, largest_factor)
            result = total * operand
        if operator == "*" and is_sum:
            expression = f"({expression})"
        expression, is_sum = f"{expression}{operator}{operand}", operator != "*"
        steps.append(f"{total}{operator}{operand}={result}")
        total = result
    solution = "\n".join([*steps, f"#### {total}"])
    return {"question": f"{expression}=?", "solution": solution, "answer": str(total)}


def write_jsonl(rows: Iterable[Mapping[str, object]], path: Path) -> None:
    """One JSON object per line, UTF-8; written beside `path`, then renamed. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
