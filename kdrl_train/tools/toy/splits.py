"""The tasks by name, and their data sets: to train on, to measure on, out of distribution."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdrl_train.tools.toy import arithmetic, countdown

Rows = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of problem."""

    make: Any
    """(n, seed, config, slips) -> n rows of question, solution, answer."""
    levels: Mapping[str, Any]
    """Name of a difficulty level -> its config, which has `longer()` and `larger()`."""
    reward: str
    """What reward.function must be."""


TASKS = {
    "arithmetic": Task(arithmetic.make_arithmetic, arithmetic.LEVELS, "math"),
    "countdown": Task(
        countdown.make_countdown,
        countdown.LEVELS,
        f"{countdown.__name__}:{countdown.countdown_reward.__name__}",
    ),
}


def make_splits(
    task: str, level: str, seed: int, *, train: int, held_out: int = 1000, slips: float = 0.0
) -> dict[str, Rows]:
    """Sets of rows, no two of which share a question.

    Args:
        task, level: a name in TASKS, and one of its levels.
        seed: with the numbers of rows it fixes every set.
        train: rows of "train".
        held_out: rows of each other set.
        slips: above 0: also "sloppy", the problems of "train" solved with slips.
    Returns: "test" and "validation", drawn as "train" is; "longer" (more steps or numbers than any
        there) and "larger" (a number above all there): out of distribution.
    Raises: ValueError for a name that is not known, a number of rows below 1, or a level with too
        few different problems.
    """
    known = _named("task", task, TASKS)
    config = _named("level", level, known.levels)
    for name, rows in (("train", train), ("held_out", held_out)):
        if rows < 1:
            raise ValueError(f"{name} must be at least 1, got {rows}")
    n = 2 * held_out + train
    order = random.Random(seed).sample(range(n), n)  # later draws are longer: short ones run out
    drawn = _take(known.make(n, seed, config), order)
    sets = {
        "train": drawn[2 * held_out :],
        "validation": drawn[held_out : 2 * held_out],
        "test": drawn[:held_out],
        "longer": known.make(held_out, seed, config.longer()),
        "larger": known.make(held_out, seed, config.larger()),
    }
    if slips:
        sets["sloppy"] = _take(known.make(n, seed, config, slips), order)[2 * held_out :]
    return sets


def _take(rows: Rows, order: list[int]) -> Rows:
    return [rows[i] for i in order]


def _named(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"{kind} must be one of {', '.join(known)}, got {name!r}")
    return known[name]
