"""arithmetic: problems are right by Python's arithmetic, different, and determined by the seed."""

import json
import re
from pathlib import Path

import pytest

from kdrl_train.rollouts.rewards import math_reward
from kdrl_train.runfolder import jsonl
from kdrl_train.tools.toy import ArithmeticConfig, make_arithmetic
from kdrl_train.tools.toy.arithmetic import LEVELS

CONFIGS = {
    "default": ArithmeticConfig(),
    "long": ArithmeticConfig(min_steps=4, max_steps=6),
    "tight": ArithmeticConfig(min_steps=3, max_steps=3, max_operand=3, max_total=3),
} | {
    f"{name}{kind}": config
    for name, level in LEVELS.items()
    for kind, config in (("", level), ("-longer", level.longer()), ("-larger", level.larger()))
}


def value(expression: str) -> int:
    assert re.fullmatch(r"[0-9+*()-]+", expression)
    return int(eval(expression))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_line_of_a_solution_is_true_and_leads_to_the_answer(config: ArithmeticConfig) -> None:
    for row in make_arithmetic(40 if config.max_total == 3 else 300, seed=3, config=config):
        assert math_reward(row["solution"], row["answer"]) == 1.0
        assert value(row["question"].removesuffix("=?")) == int(row["answer"])
        *steps, last = row["solution"].split("\n")
        assert last == f"#### {row['answer']}"
        assert config.min_steps <= len(steps) <= config.max_steps
        carried = None
        for step in steps:
            left, right = step.split("=")
            assert value(left) == int(right)
            assert 1 <= int(right) <= config.max_total
            assert carried in (None, re.split(r"[+*-]", left)[0])  # each starts from the one before
            carried = right
        assert carried == row["answer"]
        numbers = [int(number) for number in re.findall(r"\d+", row["question"])]
        assert config.beyond < max(numbers) <= config.max_operand


def test_rows_are_a_function_of_the_seed() -> None:
    rows = make_arithmetic(50, seed=1)
    assert make_arithmetic(50, seed=1) == rows
    assert make_arithmetic(20, seed=1) == rows[:20]
    assert make_arithmetic(50, seed=2) != rows


def test_questions_differ_and_use_every_operator() -> None:
    questions = [row["question"] for row in make_arithmetic(3000, seed=0)]
    assert len(set(questions)) == 3000
    text = "".join(questions)
    assert all(symbol in text for symbol in "+-*()")


def test_slips_change_solutions_and_nothing_else() -> None:
    clean, sloppy = make_arithmetic(2000, seed=0), make_arithmetic(2000, seed=0, slips=0.3)
    steps = wrong_steps = right_ends = 0
    for right, row in zip(clean, sloppy, strict=True):
        assert (row["question"], row["answer"]) == (right["question"], right["answer"])
        *lines, last = row["solution"].split("\n")
        carried = lines[0].split("=")[0]
        for line in lines:
            left, result = line.split("=")
            assert re.split(r"[+*-]", left)[0] == re.split(r"[+*-]", carried)[0]
            off = int(result) - value(left)
            assert off in (0, -10, -2, -1, 1, 2, 10)
            assert 1 <= int(result) <= 99
            steps, wrong_steps, carried = steps + 1, wrong_steps + (off != 0), result
        assert last == f"#### {carried}"
        assert (carried == row["answer"]) == math_reward(row["solution"], row["answer"])
        right_ends += carried == row["answer"]
    # 5,700 steps, 30% each: the standard deviation is 0.6%; a few steps have no slip within range
    assert wrong_steps / steps == pytest.approx(0.3, abs=0.02)
    assert 0.3 < right_ends / 2000 < 0.45  # 0.7 ** 2.85, and some slips cancel


@pytest.mark.parametrize("slips", [-0.1, 1.5])
def test_slips_out_of_range_are_refused(slips: float) -> None:
    with pytest.raises(ValueError, match=rf"slips must be in \[0, 1\], got {slips}"):
        make_arithmetic(1, 0, slips=slips)


def test_a_space_too_small_is_named() -> None:
    config = ArithmeticConfig(min_steps=1, max_steps=1, max_operand=2, max_total=2)
    # 1+1, 1*2, 2-1: three problems in all
    assert {row["question"] for row in make_arithmetic(3, 0, config)} == {"1+1=?", "1*2=?", "2-1=?"}
    with pytest.raises(ValueError, match=r"n must be at most .*, got 4: no new one after 3"):
        make_arithmetic(4, 0, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_steps": 0}, "min_steps must be at least 1, got 0"),
        ({"min_steps": 4, "max_steps": 3}, "got min_steps = 4, max_steps = 3"),
        ({"max_operand": 1}, "max_operand must be at least 2, got 1"),
        ({"max_total": 8}, "max_total must be at least max_operand = 9, got 8"),
        ({"beyond": 9}, "beyond must be less than max_operand = 9, got 9"),
        ({"beyond": -1}, "beyond must be at least 0, got -1"),
    ],
)
def test_bad_configurations_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArithmeticConfig(**fields)


def test_jsonl_is_one_object_per_line_and_leaves_nothing_else(tmp_path: Path) -> None:
    rows = [{"question": "1+1=?", "answer": "zwei ü"}, {"question": "line\nbreak", "answer": "2"}]
    jsonl.write(tmp_path / "new" / "task.jsonl", rows)
    lines = (tmp_path / "new" / "task.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["task.jsonl"]
