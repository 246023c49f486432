"""real data: every gold answer is read, is right against itself and wrong against another.

The sets are not part of the project. KDRL_DATA names their folder; without it these tests skip.
"""

import os
import re
from pathlib import Path

import math_verify
import pytest

from kdrl_train.config import DataConfig, RewardConfig
from kdrl_train.rollouts.problems import load_examples
from kdrl_train.rollouts.rewards import check_readable
from kdrl_train.rollouts.verifier import Verifier

NAMED = os.environ.get("KDRL_DATA", "")
FOLDER = Path(NAMED)
pytestmark = pytest.mark.skipif(
    not (NAMED and FOLDER.is_dir()),
    reason=f"KDRL_DATA must be a folder with the real sets, got {NAMED!r}",
)

SETS = {
    "gsm8k": {"train": 7473, "test": 1319},
    "aime24": {"test": 30},
    "amc23": {"test": 40},
}


def gold_answers(name: str) -> list[str]:
    examples = [
        example
        for split in SETS[name]
        for example in load_examples(DataConfig(path=str(FOLDER / name), split=split))
    ]
    return [example.gold for example in examples]


def changed(answer: str) -> str:
    """Change the last digit of a number: 1,234 -> 1,235 and 9 -> 0."""
    return re.sub(r"\d$", lambda digit: str((int(digit[0]) + 1) % 10), answer)


@pytest.mark.parametrize("name", SETS)
def test_every_gold_answer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    golds = gold_answers(name)
    assert len(golds) == sum(SETS[name].values())
    for gold in golds:
        check_readable(gold)
    boxed = [f"Let us see. The answer is \\boxed{{{gold}}}." for gold in golds]
    stated = [f"Let us see.\n#### {gold}" for gold in golds]
    others = [f"The answer is \\boxed{{{changed(gold)}}}." for gold in golds]
    with Verifier(RewardConfig()) as verifier:
        right = verifier.score([*boxed, *stated], [*golds, *golds]).counts["right"]
        wrong = verifier.score(others, golds).counts["wrong"]
    with capsys.disabled():
        counts = f"{len(golds)} gold answers parsed, {right // 2} right against themselves"
        print(f"\n{name}: {counts}, {wrong} wrong against a changed number")
    assert right == 2 * len(golds)
    assert wrong == len(golds)


@pytest.mark.parametrize("name", SETS)
def test_math_verify_reads_the_same_number(name: str) -> None:
    """Plain numbers never reach math-verify; here its own reading of them agrees with ours."""
    answers = sorted(set(gold_answers(name)))[:: 5 if name == "gsm8k" else 1]
    for answer in answers:
        gold = math_verify.parse(f"${answer}$")
        assert math_verify.verify(gold, math_verify.parse(f"${answer}$"))
        assert not math_verify.verify(gold, math_verify.parse(f"${changed(answer)}$"))
