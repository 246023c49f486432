"""Names the tasks and makes their data sets: for training, for measuring, out of distribution."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdrl_train.tools.toy import arithmetic, countdown

Rows = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Task:
    """Describes one kind of problem."""

    make: Any
    """Function (n, seed, config, slips) -> n rows of question, solution, answer."""
    levels: Mapping[str, Any]
    """Name of a difficulty level -> its config, which has `longer()` and `larger()`."""
    reward: str
    """The value that reward.function must have."""


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
    """Makes sets of rows, no two of which share a question.

    Args:
        task, level: a name in TASKS, and one of its levels.
        seed: determines every set, together with the numbers of rows.
        train: rows of "train".
        held_out: rows of each other set.
        slips: if above 0, there is also "sloppy", the problems of "train" solved with slips.
    Returns: "train"; "test" and "validation", drawn like it; "longer" (more steps or numbers than
        in any problem of "train") and "larger" (with a number above all of "train").
    Raises: ValueError for an unknown name, a number of rows below 1, or a level with too few
        different problems.
    """
    chosen = _named("task", task, TASKS)
    config = _named("level", level, chosen.levels)
    for name, rows in (("train", train), ("held_out", held_out)):
        if rows < 1:
            raise ValueError(f"{name} must be at least 1, got {rows}")
    n = 2 * held_out + train
    # short problems run out while they are drawn, so later ones are longer: shuffle
    order = random.Random(seed).sample(range(n), n)
    drawn = _take(chosen.make(n, seed, config), order)
    sets = {
        "train": drawn[2 * held_out :],
        "validation": drawn[held_out : 2 * held_out],
        "test": drawn[:held_out],
        "longer": chosen.make(held_out, seed, config.longer()),
        "larger": chosen.make(held_out, seed, config.larger()),
    }
    if slips:
        sets["sloppy"] = _take(chosen.make(n, seed, config, slips), order)[2 * held_out :]
    return sets


def _take(rows: Rows, order: list[int]) -> Rows:
    return [rows[i] for i in order]


def _named(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"{kind} must be one of {', '.join(known)}, got {name!r}")
    return known[name]
