"""countdown: the reward checks every step, and every problem has a correct derivation."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrl_train.rollouts.rewards import UnparseableError, load_answer, load_reward
from kdrl_train.tools.toy import CountdownConfig, countdown_reward, make_countdown
from kdrl_train.tools.toy.countdown import LEVELS

GOLD = "3,5,7->26"


@pytest.mark.parametrize(
    "completion",
    [
        "7*3=21\n21+5=26\n#### 26",
        "3*7=21\n5+21=26\n#### 26",
        "\n3*7=21\n5+21=26\n####26 \n",
        "07*3=021\n21+5=26\n#### 26",
    ],
)
def test_any_right_derivation_is_right(completion: str) -> None:
    assert countdown_reward(completion, GOLD) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("7*3=21\n21+5=26\n#### 25", GOLD),
        ("7*3=21\n21-5=16\n#### 16", GOLD),
        ("7*3=20\n20+5=25\n#### 26", GOLD),
        ("7*3=22\n22+5=26\n#### 26", GOLD),
        ("7*3=23\n23+3=26\n#### 26", GOLD),
        ("7+7=14\n14+5=19\n19+7=26\n#### 26", GOLD),
        ("3*3=9\n9+5=14\n14+7=21\n21+5=26\n#### 26", GOLD),
        ("13*2=26\n#### 26", GOLD),
        ("#### 26", GOLD),
        ("20+6=26\n#### 26", "6,20,3->26"),
        ("6+6=12\n#### 12", "2,6->12"),
        ("5-5=0\n3-0=3\n#### 3", "3,5->3"),
        ("999999999*999999999=26\n#### 26", GOLD),
    ],
    ids=[
        "end-not-stated",
        "other-end",
        "slip",
        "wrong-step-reaches-target",
        "number-used-twice-one-left",
        "number-used-twice",
        "each-twice",
        "numbers-not-given",
        "no-steps",
        "number-left-over",
        "same-number-on-both-sides",
        "one-number-as-both-operands",
        "large",
    ],
)
def test_wrong_derivations(completion: str, answer: str) -> None:
    assert countdown_reward(completion, answer) == 0.0


def test_two_equal_numbers_may_each_be_used() -> None:
    assert countdown_reward("6+6=12\n#### 12", "6,6->12") == 1.0
    assert countdown_reward("6+6=12\n12-6=6\n#### 6", "6,6->12") == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "26",
        "7*3=21\n21+5=26",
        "7*3=21\n21+5=26\n#### 26\nand more",
        "7*3+5=26\n#### 26",
        "7*3=21,21+5=26\n#### 26",
        "7*3=21\n\n21+5=26\n#### 26",
        "3-7=-4\n5--4=9\n#### 9",
        "7 * 3 = 21\n21+5=26\n#### 26",
        "14/2=7\n#### 7",
        "\N{ARABIC-INDIC DIGIT SEVEN}*3=21\n21+5=26\n#### 26",
        "7*3=" + "9" * 10_000 + "\n#### 26",
        "#### " + "9" * 1_000_000,
        "7*3=21\n" * 10_000,
        "\ud800",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_what_cannot_be_read_is_told_apart(completion: str) -> None:
    with pytest.raises(UnparseableError, match="completion must be steps like"):
        countdown_reward(completion, GOLD)
    assert load_answer(countdown_reward)(completion) is None


@pytest.mark.parametrize("answer", ["", "26", "3,5,7", "3,5,->7", "3,-5->2", "->3"])
def test_a_gold_answer_that_cannot_be_read_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match=r"answer must be .* got .*correct the row") as error:
        countdown_reward("#### 26", answer)
    assert not isinstance(error.value, UnparseableError)


def test_the_vote_is_for_the_derivation() -> None:
    read = load_answer(load_reward("kdrl_train.tools.toy.countdown:countdown_reward"))
    wrong, other = "7*3=22\n22+5=26\n#### 26", "13*2=26\n#### 26"
    assert read(wrong) == read(wrong + "\n") != read(other)


@given(st.lists(st.integers(0, 20), min_size=2, max_size=4), st.data())
def test_the_verdict_is_that_of_the_expression_written_out(
    numbers: list[int], data: st.DataObject
) -> None:
    """Draws derivations that are right by construction, and then changes one character."""
    left, lines = list(numbers), []
    while len(left) > 1:
        a = left.pop(data.draw(st.integers(0, len(left) - 1)))
        b = left.pop(data.draw(st.integers(0, len(left) - 1)))
        a, b = max(a, b), min(a, b)
        operator = data.draw(st.sampled_from("+-*"))
        left.append(int(eval(f"{a}{operator}{b}")))
        lines.append(f"{a}{operator}{b}={left[-1]}")
    text = "\n".join([*lines, f"#### {left[0]}"])
    answer = f"{','.join(map(str, numbers))}->{left[0]}"
    assert countdown_reward(text, answer) == 1.0
    place = data.draw(st.sampled_from([i for i, char in enumerate(text) if char.isdigit()]))
    digit = data.draw(st.sampled_from([d for d in "123456789" if d != text[place]]))
    assert countdown_reward(text[:place] + digit + text[place + 1 :], answer) == 0.0


CONFIGS = {
    f"{name}{kind}": config
    for name, level in LEVELS.items()
    for kind, config in (("", level), ("-longer", level.longer()), ("-larger", level.larger()))
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_solution_is_right_and_within_bounds(config: CountdownConfig) -> None:
    for row in make_countdown(300, seed=3, config=config):
        assert countdown_reward(row["solution"], row["answer"]) == 1.0
        numbers = [int(number) for number in row["question"].split("->")[0].split(",")]
        assert numbers == sorted(numbers)
        assert config.min_numbers <= len(numbers) <= config.max_numbers
        assert min(numbers) >= 1
        assert config.beyond < max(numbers) <= config.max_number
        results = map(int, re.findall(r"=(\d+)", row["solution"]))
        assert all(1 <= result <= config.max_total for result in results)


def test_small_spaces_are_drawn_whole() -> None:
    config = CountdownConfig(min_numbers=2, max_numbers=2, max_number=3, max_total=6)
    reachable = {
        f"{a},{b}->{total}"
        for a, b in itertools.combinations_with_replacement(range(1, 4), 2)
        for total in {a + b, b - a, a * b if a > 1 else 0}
        if 1 <= total <= 6
    }
    rows = make_countdown(len(reachable), 0, config)
    assert {row["question"] for row in rows} == reachable
    with pytest.raises(ValueError, match=rf"n must be .*, got 99: .* after {len(reachable)};"):
        make_countdown(99, 0, config)


def test_slips_change_solutions_and_nothing_else() -> None:
    clean, sloppy = make_countdown(2000, seed=0), make_countdown(2000, seed=0, slips=0.3)
    wrong_steps = right = 0
    for row, other in zip(clean, sloppy, strict=True):
        assert (row["question"], row["answer"]) == (other["question"], other["answer"])
        steps = re.findall(r"(.*)=(\d+)", other["solution"])
        assert [int(end) for end in re.findall(r"#### (\d+)", other["solution"])] == [
            int(steps[-1][1])
        ]
        off = [int(result) - eval(left) for left, result in steps]
        assert set(off) <= {0, -10, -2, -1, 1, 2, 10}
        assert all(1 <= int(result) <= CountdownConfig().max_total for _, result in steps)
        wrong_steps += sum(change != 0 for change in off)
        verdict = countdown_reward(other["solution"], other["answer"])
        assert verdict == (not any(off))
        right += verdict == 1.0
    # 4,000 steps, 30% each: the standard deviation is 0.7%; a few steps have no slip within range
    assert wrong_steps / 4000 == pytest.approx(0.3, abs=0.025)
    assert right / 2000 == pytest.approx(0.49, abs=0.05)  # 0.7 ** 2


def test_a_slip_everywhere_is_never_right() -> None:
    for row in make_countdown(300, seed=0, slips=1.0):
        assert countdown_reward(row["solution"], row["answer"]) == 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_numbers": 1}, "min_numbers must be at least 2, got 1"),
        ({"min_numbers": 4, "max_numbers": 3}, "got min_numbers = 4, max_numbers = 3"),
        ({"max_number": 1}, "max_number must be at least 2, got 1"),
        ({"max_number": 9, "max_total": 8}, "max_total must be at least max_number = 9, got 8"),
        ({"max_number": 9, "beyond": 9}, "beyond must be less than max_number = 9, got 9"),
        ({"beyond": -1}, "beyond must be at least 0, got -1"),
    ],
)
def test_bad_configurations_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CountdownConfig(**fields)
