"""Gold answers judged by several rewards, and by ones that see more of a problem."""

from collections.abc import Sequence
from typing import Any

import pytest

from kdrl_train.batch import Example, Outcome, Verdicts
from kdrl_train.config import EvaluateConfig, RewardConfig
from kdrl_train.start.gold_answers import check_gold


class Replies:
    """Replies what a verifier with these rewards may reply, and keeps what it was asked."""

    def __init__(self, inputs: set[str], outcomes: Sequence[Outcome], bonus: float = 9.0) -> None:
        self.inputs = frozenset({"completion", "answer"} | inputs)
        self.outcomes, self.bonus = list(outcomes), bonus
        self.more: list[dict[str, Any]] = []

    def score(self, texts: list[str], _golds: list[str], more: list[dict[str, Any]]) -> Verdicts:
        self.more += more
        count = len(texts)
        errors = {i: f"bonus: KeyError {i}" for i, o in enumerate(self.outcomes) if o == "error"}
        parts = {"math": [1.0] * count, "bonus": [self.bonus] * count}
        return Verdicts([1.0 + self.bonus] * count, self.outcomes, errors, parts=parts)


def settings(*functions: str, right_above: float = 0.5) -> EvaluateConfig:
    reward = RewardConfig(functions=functions, right_above=right_above)  # type: ignore[arg-type]
    return EvaluateConfig(reward=reward)


EXAMPLES = [Example(f"set:{i}", f"problem {i}", "5", columns={"level": i}) for i in range(3)]


def test_the_rewards_that_see_a_problem_judge_each_and_others_each_gold_answer() -> None:
    alone = Replies(set(), ["right"])
    detail = check_gold(settings("math", "my:bonus"), EXAMPLES, alone)  # type: ignore[arg-type]
    assert detail == "3 right; right: a value of math above 0.5 (reward.right_above)"
    assert alone.more == [{}]
    seeing = Replies({"prompt", "columns"}, ["right"] * 3)
    check_gold(settings("math", "my:bonus"), EXAMPLES, seeing)  # type: ignore[arg-type]
    assert seeing.more == [{"prompt": f"problem {i}", "columns": {"level": i}} for i in range(3)]


def test_gold_answers_must_be_right_for_math_and_without_error_for_the_others() -> None:
    config, sees = settings("math", "my:bonus"), {"prompt"}
    for outcomes, message in (
        (
            ["right", "wrong", "right"],
            r"^gold answers must be right against .*first: set:1, .*wrong",
        ),
        (
            ["right", "right", "error"],
            r"^reward\.functions must judge gold answers in a box without an error, got 2 right, 1 "
            r"error; first: set:2, answer '5', error bonus: KeyError 2: correct the function, or ",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check_gold(config, EXAMPLES, Replies(sees, outcomes))  # type: ignore[arg-type]
    slow = Replies(sees, ["right", "timeout", "right"])  # the bonus may be slow
    with pytest.raises(UserWarning, match=r"within reward\.timeout_s, got 2 right, 1 timeout"):
        check_gold(config, EXAMPLES, slow)  # type: ignore[arg-type]


def test_the_threshold_is_compared_with_the_value_of_the_one_that_decides() -> None:
    bonus = settings("my:bonus", "math", right_above=2.0)
    with pytest.raises(UserWarning, match=r"a value of bonus above 2 .* rewards from 9 to 9: set"):
        check_gold(bonus, EXAMPLES, Replies(set(), ["right"]))  # type: ignore[arg-type]
    detail = check_gold(bonus, EXAMPLES, Replies(set(), ["right"], 4.0))  # type: ignore[arg-type]
    assert detail.endswith("rewards from 4 to 4")


def test_a_threshold_below_what_math_pays_for_a_wrong_answer_is_doubtful() -> None:
    config = settings("math", right_above=-0.5)
    with pytest.raises(
        UserWarning, match=r"^reward\.right_above must be at least 0 for math, got -"
    ):
        check_gold(config, EXAMPLES, Replies(set(), ["right"]))  # type: ignore[arg-type]


def test_columns_that_no_reward_gets_are_named() -> None:
    examples = [*EXAMPLES, Example("set:3", "", "5", columns={"image": b"PNG"})]
    seeing = Replies({"columns"}, ["right"] * 4)
    with pytest.raises(UserWarning, match=r"^rewards do not get the columns image, .*; 4 right; "):
        check_gold(settings("math", "my:bonus"), examples, seeing)  # type: ignore[arg-type]
    check_gold(settings("math"), examples, Replies(set(), ["right"]))  # type: ignore[arg-type]
