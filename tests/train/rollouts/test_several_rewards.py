"""Several rewards, each with a weight, and what a reward may see beside completion and answer."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kdrl_train.batch import Example, Rollouts, Verdicts
from kdrl_train.config import RewardConfig
from kdrl_train.method.evaluation import problem_scores
from kdrl_train.method.metrics import reward_metrics
from kdrl_train.rollouts.reward_inputs import (
    MOST_CHARS,
    answer_inputs,
    check_columns,
    reward_inputs,
)
from kdrl_train.rollouts.rewards import call, inputs_of, load_reward
from kdrl_train.rollouts.verifier import Verifier, judge_rule, verdicts_of
from kdrl_train.rollouts.verifier_worker import JudgedCompletion, judge

REWARDS = "tests.train.scripted_rewards"
FORMAT = {"function": f"{REWARDS}:fails_on_b", "weight": 0.1, "name": "format"}


def judged(config: RewardConfig, completion: str, answer: str = "5") -> JudgedCompletion:
    inputs = {"completion": completion, "answer": answer, "raw_completion": completion}
    return judge(judge_rule(config), inputs | {"tokens": [7] * len(completion)})


@pytest.mark.parametrize(
    ("completion", "reward", "outcome", "vote", "values"),
    [
        (r"so \boxed{5}", 1.05, "right", "5", (1.0, 0.5)),
        (r"so \boxed{6}", 0.05, "wrong", "6", (0.0, 0.5)),
        (r"- so \boxed{5}", 0.95, "right", "5", (1.0, -0.5)),
        ("I give up", 0.05, "unparseable", None, (0.0, 0.5)),
    ],
)
def test_the_reward_is_a_weighted_sum_and_the_first_says_what_is_right(
    completion: str, reward: float, outcome: str, vote: str | None, values: tuple[float, ...]
) -> None:
    """Its bonus is above right_above and says `True` itself: it made every completion right."""
    verdict = judged(RewardConfig(functions=("math", FORMAT), right_above=-1.0), "x")
    assert verdict.outcome == "unparseable"
    verdict = judged(RewardConfig(functions=("math", FORMAT)), completion)
    assert verdict.reward == pytest.approx(reward)
    assert verdict[1:] == (outcome, "", vote, values)


def test_the_one_that_decides_is_compared_without_its_weight() -> None:
    math_part = {"function": "math", "weight": 0.1, "decides": True}
    config = RewardConfig(functions=(FORMAT, math_part))
    assert judged(config, r"\boxed{5}")[:2] == (pytest.approx(0.15), "right")
    assert judged(config, r"\boxed{6}")[:2] == (pytest.approx(0.05), "wrong")
    other = RewardConfig(functions=({"function": f"{REWARDS}:short", "weight": 9}, "exact"))
    assert judged(other, "ab").outcome == "wrong"  # 0.5, not above it
    assert judged(other, "a").outcome == "right"
    assert judged(other, "ab").reward == 4.5  # `exact` reads nothing, and pays nothing


def test_an_error_of_one_is_an_error_of_the_completion_and_names_it() -> None:
    verdict = judged(RewardConfig(functions=("math", FORMAT)), r"b \boxed{5}")
    assert math.isnan(verdict.reward)
    assert (verdict.outcome, verdict.values) == ("error", ())
    assert verdict.message.startswith("format: KeyError: 'b' (")
    huge = {"function": f"{REWARDS}:short", "weight": 1e308}
    verdict = judged(RewardConfig(functions=(huge, huge | {"name": "b"})), "a")
    assert verdict.message == "the sum of the rewards must be a finite number, got inf"


def test_verdicts_hold_the_values_of_each() -> None:
    config = RewardConfig(functions=("math", FORMAT))
    right = JudgedCompletion(1.05, "right", "", "5", (1.0, 0.5))
    parts = [
        verdicts_of(one, config)
        for one in (
            [right, JudgedCompletion(0.0, "timeout")],
            [JudgedCompletion(math.nan, "error", "x")],
            [],
        )
    ]
    joined = Verdicts.join(parts)
    assert joined.parts["math"][:2] == [1.0, 0.0]
    assert joined.parts["format"][:2] == [0.5, 0.0]
    assert math.isnan(joined.parts["math"][2])
    assert joined.errors == {2: "x"}
    assert Verdicts.join([*parts, Verdicts([1.0], ["right"])]).parts == {}


def test_the_mean_of_each_is_a_metric_where_there_are_several() -> None:
    rewards_PG = torch.tensor([[1.05, 0.05], [math.nan, 0.0]])
    right_PG = torch.tensor([[True, False], [False, False]])
    parts = {"math": [1.0, 0.0, math.nan, 0.0], "format": [0.5, 0.5, math.nan, 0.5]}
    metrics = reward_metrics(rewards_PG, right_PG, parts)
    assert metrics["reward/math"] == pytest.approx(1 / 3)
    assert metrics["reward/format"] == 0.5
    assert (metrics["accuracy"], metrics["rewards_missing"]) == (pytest.approx(1 / 3), 1.0)
    alone = reward_metrics(rewards_PG, right_PG, {"math": parts["math"]})
    assert [key for key in alone if key.startswith("reward/")] == []


def test_evaluation_counts_the_verdict_of_the_one_that_decides() -> None:
    config = RewardConfig(functions=("math", FORMAT | {"weight": 9}))
    texts = (r"\boxed{5}", r"\boxed{6}", r"\boxed{6}", "none")
    verdicts = verdicts_of([judged(config, text) for text in texts], config)
    scores = {name: values.item() for name, values in problem_scores(verdicts, 4).items()}
    assert scores == {"avg@4": 0.25, "pass@1": 0.25, "pass@2": 0.5, "pass@4": 1.0, "maj@4": 0.0}


# what a reward sees


def lambda_reward(*_completion: str) -> float:
    return 0.0


def open_ended(completion: str, **columns: object) -> float:
    return float(len(completion) + len(columns))


def runs(prompt: str) -> float:
    return float(len(prompt))


def command(completion: str, shell: str) -> float:
    return float(len(completion) + len(shell))


def of_gold(__: str, gold: str) -> float:
    return float(len(gold))


def with_defaults(completion: str, least: float = 0.0, gold: str = "") -> float:
    return max(float(min(len(completion), len(gold))), least)


def by_place(completion: str, least: float = 0.0, gold: str = "", /) -> float:
    return max(float(len(completion) + len(gold)), least)


def all_by_default(completion: str = "") -> float:
    return float(len(completion))


@pytest.mark.fault("hostile config or data")
@pytest.mark.parametrize("function", [all_by_default, lambda_reward, open_ended, runs, command])
def test_other_parameters_make_no_reward(function: Callable[..., float]) -> None:
    message = r"with the parameters \(completion, answer\) or others of completion, answer, prompt"
    with pytest.raises(ValueError, match=message):
        load_reward(f"{__name__}:{function.__name__}")


def test_parameters_name_what_a_reward_gets() -> None:
    assert inputs_of(load_reward(f"{REWARDS}:short")) == {"tokens": "tokens"}
    assert inputs_of(of_gold) == {"__": "completion", "gold": "answer"}
    assert "least" not in inputs_of(load_reward(f"{REWARDS}:sees"))
    assert inputs_of(with_defaults) == {"completion": "completion", "gold": "answer"}
    assert call(with_defaults, {"completion": "abc", "answer": "xyz"}) == 3.0
    assert inputs_of(by_place) == {"completion": "completion"}
    assert inputs_of(load_reward(f"{REWARDS}:sees"))["gold"] == "answer"


def rollouts_of(tokenizer: Any, texts: list[str]) -> Rollouts:
    """Make completions that end but for the last one."""
    ends = [tokenizer.eos_token] * (len(texts) - 1) + [""]
    ids = [
        torch.tensor(tokenizer(text + end)["input_ids"])
        for text, end in zip(texts, ends, strict=True)
    ]
    return Rollouts(
        prompt_ids=ids,
        completion_ids=ids,
        logprobs=[torch.zeros(len(one)) for one in ids],
        truncated=torch.tensor([not end for end in ends]),
        texts=texts,
    )


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    functions = (f"{REWARDS}:sees", {"function": f"{REWARDS}:short", "weight": 0.5})
    hanging = {"function": f"{REWARDS}:hangs", "weight": 0.0}
    config = RewardConfig(functions=(*functions, hanging), workers=1, timeout_s=1.0)
    with Verifier(config) as opened:
        yield opened


def test_a_reward_sees_what_its_parameters_name(verifier: Verifier, tokenizer: Any) -> None:
    texts, golds = ["abc", "a", "abcd"], ["1", "2", "3"]
    examples = [
        Example(f"set:{gold}", f"{gold}+0=", gold, columns={"set": {"gold": gold}})
        for gold in golds
    ]
    rollouts = rollouts_of(tokenizer, texts)
    assert verifier.inputs == {*("completion", "answer", "prompt"), *rest_of(verifier)}
    more = reward_inputs(verifier.inputs, examples, rollouts, tokenizer)
    verdicts = verifier.score(texts, golds, more=more)
    assert verdicts.errors == {}
    assert verdicts.parts["sees"] == [1.0, 1.0, 1.0]
    assert verdicts.parts["short"] == [1 / 4, 1 / 2, 1 / 4]
    assert verdicts.rewards == [1.125, 1.25, 1.125]
    other = reward_inputs(verifier.inputs, examples[::-1], rollouts, tokenizer)
    assert verifier.score(texts, golds, more=other).parts["sees"] == [0.25, 1.0, 0.25]
    boxed = answer_inputs(verifier.inputs, examples, texts, tokenizer)
    assert [len(one["tokens"]) for one in boxed] == [3, 1, 4]
    for short in (None, more[:2], [{}] * 3):
        with pytest.raises(
            ValueError, match=r"must hold columns, prompt, raw_completion, tokens, truncat"
        ):
            verifier.score(texts, golds, more=short)


def test_a_reward_gets_the_plain_columns_of_a_record(tokenizer: Any) -> None:
    plain = {"source": "gsm8k", "info": {"level": 3, "tags": ["a", None]}, "share": 0.5, "ok": True}
    other = {"image": b"PNG", "set": {1}, "deep": [{"x": [object()]}]}
    example = Example("set:1", "1+0=", "1", columns=plain | other)
    (inputs,) = reward_inputs({"columns"}, [example], rollouts_of(tokenizer, ["a"]), tokenizer)
    assert inputs == {"columns": plain}
    assert check_columns([example]) == ["image", "set", "deep"]
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    assert check_columns([Example("set:2", "", "", columns={"a": 1, "deep": deep})]) == ["deep"]
    large = Example("set:3", "", "", columns={"text": "x" * MOST_CHARS})
    with pytest.raises(
        ValueError, match=r"at most 1,000,000 characters .*, got 1,000,\d+ in set:3"
    ):
        check_columns([example, large])


def rest_of(verifier: Verifier) -> set[str]:
    return {"columns", "raw_completion", "tokens", "truncated"} & verifier.inputs


@pytest.mark.slow
@pytest.mark.fault("reward function")
def test_a_hang_of_any_reward_is_a_timeout_of_the_completion(
    verifier: Verifier, tokenizer: Any
) -> None:
    texts, golds = ["hang", "fine"], ["1", "1"]
    examples = [Example("set:1", "1+0=", "1", columns={"set": {"gold": "1"}})] * 2
    more = answer_inputs(verifier.inputs, examples, texts, tokenizer)
    verdicts = verifier.score(texts, golds, more=more)
    assert verdicts.outcomes[0] == "timeout"
    assert verdicts.rewards[0] == 0.0
    assert [values[0] for values in verdicts.parts.values()] == [0.0, 0.0, 0.0]
    assert verdicts.outcomes[1] in ("right", "wrong")
