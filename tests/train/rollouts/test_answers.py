"""answers: hundreds of pairs, worked by hand, of equal and of different answers (answers.txt)."""

import random
import time
from pathlib import Path

import pytest

from kdrl_train.rollouts.rewards import UnparseableError, check_readable, math_reward

LINES = Path(__file__).with_name("answers.txt").read_text(encoding="utf-8").splitlines()
EQUAL = [line.split(" ≡ ") for line in LINES if " ≡ " in line]
DIFFERENT = [tuple(line.split(" ≢ ")) for line in LINES if " ≢ " in line and line[0] != "#"]
REFUSED = [line.removeprefix("✗ ") for line in LINES if line.startswith("✗ ")]


def reward(stated: str, gold: str) -> float | None:
    """Judge a boxed answer; None where it, or the gold answer, cannot be read."""
    try:
        return math_reward(rf"so \boxed{{{stated}}}", gold)
    except ValueError:
        return None


@pytest.mark.parametrize("spellings", EQUAL, ids=lambda spellings: ascii(spellings[0]))
def test_equal(spellings: list[str]) -> None:
    first = spellings[0]
    pairs = [*((first, other) for other in spellings), *((other, first) for other in spellings)]
    assert [pair for pair in pairs if reward(*pair) != 1.0] == []


def test_different() -> None:
    pairs = [*DIFFERENT, *((b, a) for a, b in DIFFERENT)]
    assert len(pairs) >= 300
    assert [pair for pair in pairs if reward(*pair)] == []


@pytest.mark.parametrize("gold", [*REFUSED, "", "  ", "9" * 1001])
def test_a_gold_answer_that_is_not_read_whole_is_refused(gold: str) -> None:
    with pytest.raises(ValueError, match="the gold answer must be a number, LaTeX, a word or"):
        check_readable(gold)
    assert not reward(gold, "5")


def test_a_damaged_answer_is_judged_or_unparseable() -> None:
    """Nothing else may be raised: it would be an error of the reward function."""
    rng, unparseable = random.Random(0), 0
    answers = [
        *(text for line in EQUAL for text in line),
        *(text for two in DIFFERENT for text in two),
    ]
    for _ in range(2000):
        text, other = rng.choice(answers), rng.choice(answers)
        start, end = sorted(rng.choices(range(len(text) + 1), k=2))
        try:
            math_reward(rf"\boxed{{{text[:start]}{other[: rng.randint(0, 4)]}{text[end:]}}}", "5")
        except UnparseableError:
            unparseable += 1
    assert 200 < unparseable < 1800


LONG = ["10^{10^{10^{10}}}", "9999999!", "2^{2^{2^{2^{2^2}}}}", r"\sin(10^{10^6})", "|" * 250]
LONG += ["(x+1)" * 49 + "(x+1)", "5," * 99 + "6", r"\sqrt{2}" * 60, "-" * 290 + "5", "x^2" * 99]
LONG += [r"\binom{10^9}{10^8}", "e^{e^{e^{e^e}}}", "1+" * 140 + "1", "9^{9^{9^9}}-9^{9^{9^9}}"]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:20])
def test_no_answer_takes_long(text: str) -> None:
    start = time.process_time()
    assert not reward(text, "5")
    assert not reward(text, "x")
    assert not reward(r"\sqrt{2}", text)
    assert time.process_time() - start < 2
