"""splits: the sets of both tasks share no question at any level."""

import subprocess
import sys

import pytest

from kdrl_train.rollouts.rewards import load_reward
from kdrl_train.tools.toy import TASKS, make_splits

LEVELS = [(task, level) for task, kind in TASKS.items() for level in kind.levels]


@pytest.mark.parametrize(("task", "level"), LEVELS)
def test_sets_share_no_question_and_their_solutions_are_right(task: str, level: str) -> None:
    sets = make_splits(task, level, 0, train=1000, held_out=1000)
    assert set(sets) == {"train", "validation", "test", "longer", "larger"}
    questions = [row["question"] for rows in sets.values() for row in rows]
    assert len(set(questions)) == len(questions) == 5000
    reward = load_reward(TASKS[task].reward)
    for rows in sets.values():
        assert all(reward(row["solution"], row["answer"]) == 1.0 for row in rows[:200])


@pytest.mark.parametrize("task", TASKS)
def test_sets_are_a_function_of_the_seed(task: str) -> None:
    again, same, other = (make_splits(task, "medium", s, train=30, held_out=50) for s in (1, 1, 2))
    assert again == same
    assert again["test"] != other["test"]


def test_what_is_held_out_is_as_hard_as_what_is_learnt() -> None:
    """Checks the mix: short problems run out while they are drawn, so the later ones are longer."""
    sets = make_splits("arithmetic", "medium", 0, train=18000, held_out=1000)

    def long(name: str) -> float:
        return sum(row["solution"].count("=") == 3 for row in sets[name]) / len(sets[name])

    assert abs(long("test") - long("train")) < 0.05
    assert abs(long("validation") - long("train")) < 0.05


@pytest.mark.parametrize("task", TASKS)
def test_sloppy_rows_are_the_rows_to_train_on(task: str) -> None:
    clean = make_splits(task, "medium", 1, train=100, held_out=10)
    sets = make_splits(task, "medium", 1, train=100, held_out=10, slips=0.5)
    sloppy = sets.pop("sloppy")
    assert sets == clean
    assert [row["question"] for row in sloppy] == [row["question"] for row in clean["train"]]
    reward = load_reward(TASKS[task].reward)
    right = sum(reward(row["solution"], row["answer"]) for row in sloppy)
    assert 5 < right < 50  # of 100, each of two or three steps right with probability 1/2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "chess"}, "task must be one of arithmetic, countdown, got 'chess'"),
        ({"level": "absurd"}, "level must be one of easy, medium, hard, got 'absurd'"),
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"held_out": 0}, "held_out must be at least 1, got 0"),
        ({"slips": 2.0}, r"slips must be in \[0, 1\], got 2.0"),
    ],
)
def test_what_cannot_be_made_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_splits(**{"task": "countdown", "level": "medium", "seed": 0, "train": 1} | fields)


def test_import_is_light() -> None:
    """Imports the tasks as a verifier worker does, without the seconds that torch takes."""
    code = (
        "import kdrl_train.tools.toy, sys; "
        "print({'torch', 'transformers', 'sympy', 'pebble'} & set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "set()"
