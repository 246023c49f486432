"""eval: unbiased pass@k, and numbers that come from the completions."""

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdrl_train import cli, train
from kdrl_train.batch import Rollouts, Verdicts
from kdrl_train.config import (
    DataConfig,
    EvalConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.errors import EngineError
from kdrl_train.method.evaluation import intervals, majority, pass_at_k, problem_scores, summarize
from kdrl_train.rollouts import sampler
from kdrl_train.rollouts.engines import generate as generate_engine
from kdrl_train.rollouts.problems import load_examples
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.tools import evaluate as evaluation
from kdrl_train.tools.evaluate import evaluate, evaluate_sets, result_table
from tests.train import scripted_rewards

REWARD = RewardConfig(function=f"{scripted_rewards.__name__}:early_bytes", workers=1)
SAMPLING = SamplingConfig(max_new_tokens=8)


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right: int, k: int) -> None:
    drawn = list(combinations(range(5), k))
    expected = sum(min(subset) < right for subset in drawn) / len(drawn)
    assert pass_at_k(5, right, k) == pytest.approx(expected)


def test_pass_at_k_refuses_more_than_was_drawn() -> None:
    with pytest.raises(ValueError, match=r"1 <= k <= n, got right=1, n=4, k=5"):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize(
    ("outcomes", "answers", "expected"),
    [
        ("RRW", ["5", "5", "6"], 1.0),
        ("RWW", ["5", "6", "6"], 0.0),
        ("RWW", ["5", "6", "7"], 1 / 3),  # three answers, one vote each
        ("RRWW", ["5", "5.0", "6", "6"], 1 / 2),  # both right ones are one answer
        ("RWWW", ["5", None, None, None], 1.0),  # nobody else has an answer
        ("WWW", [None, None, None], 0.0),
        ("RWW", ["5", "5", "6"], 1 / 3),  # the same spelling, judged otherwise, is another answer
    ],
)
def test_majority_by_hand(outcomes: str, answers: list[str | None], expected: float) -> None:
    right = [letter == "R" for letter in outcomes]
    assert majority(right, answers) == pytest.approx(expected)
    assert majority(right[::-1], answers[::-1]) == pytest.approx(expected)


def verdicts(outcomes: str, answers: list[str | None]) -> Verdicts:
    names = {"R": "right", "W": "wrong", "U": "unparseable", "T": "timeout"}
    return Verdicts([0.0] * len(answers), [names[letter] for letter in outcomes], answers=answers)


def test_scores_of_problems_by_hand() -> None:
    scores = problem_scores(verdicts("RRWWUTWWRWWW", [*"5567", None, None, *"895666"]), samples=4)
    assert {name: values.tolist() for name, values in scores.items()} == {
        "avg@4": [0.5, 0, 0.25],
        "pass@1": [0.5, 0, 0.25],
        "pass@2": [pytest.approx(5 / 6), 0, 0.5],
        "pass@4": [1, 0, 1],
        "maj@4": [1, 0, 0],
    }
    silent = verdicts("RWRR", [None] * 4)  # a reward that says nothing of its answers
    assert "maj@2" not in problem_scores(silent, samples=2)
    assert problem_scores(verdicts("UUTU", [None] * 4), samples=2)["maj@2"].tolist() == [0, 0]


def test_intervals_are_those_of_the_mean() -> None:
    draw = np.random.default_rng(0)
    scores = {"a": (draw.random(400) < 0.3).astype(float), "b": np.full(400, 0.7)}
    bounds = intervals(scores, seed=0)
    assert bounds["b"] == pytest.approx((0.7, 0.7))
    mean = scores["a"].mean()
    half = 1.96 * (mean * (1 - mean) / 400) ** 0.5  # by the normal distribution
    assert bounds["a"] == (
        pytest.approx(mean - half, abs=half / 7),
        pytest.approx(mean + half, abs=half / 7),
    )
    assert intervals(scores, seed=0) == bounds
    assert intervals(scores, seed=1)["a"] != bounds["a"]


def test_a_measurement_of_a_model(folders: dict[str, Path], tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["student"])
    data = DataConfig(path=str(folders["task"]))
    examples = load_examples(data)
    with Verifier(REWARD) as verifier:

        def measure(**changes: Any) -> Any:
            sampling = replace(SAMPLING, group_size=3)
            settings = {"data": data, "sampling": sampling, "verifier": verifier}
            return evaluate(model, tokenizer, examples, **settings | changes)

        result = measure()
        assert (result.problems, result.samples) == (20, 3)
        assert sum(result.outcomes.values()) == 60
        assert result.avg_at_k == pytest.approx(result.outcomes["right"] / 60)
        assert result.maj_at_k is None  # random texts state no answer
        assert list(result.shares) == ["avg@3", "pass@2", "pass@3"]
        assert list(result.pass_at_k) == [1, 2, 3]
        assert result.pass_at_k[1] == pytest.approx(result.avg_at_k)
        assert 0 < result.pass_at_k[1] < result.pass_at_k[2] < result.pass_at_k[3] <= 1
        assert 0 < result.truncated <= 1
        assert 7 < result.mean_length <= 8
        for name, share in result.shares.items():
            low, high = result.intervals[name]
            assert 0 <= low < share < high <= 1, name
        again, other = measure(), measure(seed=1)
        assert again.intervals == result.intervals
        assert (again.avg_at_k, again.mean_length) == (result.avg_at_k, result.mean_length)
        assert other.outcomes != result.outcomes
        with pytest.raises(ValueError, match="at least one problem, got none"):
            evaluate(model, tokenizer, [], data=data, sampling=SAMPLING, verifier=verifier)


def test_sets_are_measured_one_by_one_and_written_together(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataConfig(path=str(folders["task"]))
    config = EvaluateConfig(
        out=tmp_path / "scores.json",
        model=ModelConfig(policy=str(folders["student"]), device="cpu"),
        data=data,
        sets={"same": data, "short": replace(data, prompt_template="{prompt}?")},
        sampling=SAMPLING,
        reward=REWARD,
        max_problems=4,
        greedy=True,
    )
    result = evaluation.main(config)
    numbers = json.loads(config.out.read_text(encoding="utf-8"))
    sets = numbers.pop("sets")
    assert (result.samples, sum(result.outcomes.values())) == (1, 4)
    assert (numbers["mean_length"], list(sets)) == (result.mean_length, ["same", "short"])
    assert sets["same"] | {"seconds": 0} == numbers | {"seconds": 0}
    assert sets["short"] | {"seconds": 0} != numbers | {"seconds": 0}
    printed = capsys.readouterr().out
    assert printed.count("4 problems, 1 completions each") == 3
    assert len(re.findall(r"\bshort\b", printed)) == 1


def test_answers_vote_as_their_reward_says(folders: dict[str, Path], tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["student"])
    data = DataConfig(path=str(folders["task"]))
    reward = replace(REWARD, function=f"{scripted_rewards.__name__}:first_byte_wins")
    with Verifier(reward) as verifier:
        result = evaluate(
            model,
            tokenizer,
            load_examples(data),
            data=data,
            sampling=replace(SAMPLING, group_size=4),
            verifier=verifier,
        )
    assert result.avg_at_k < result.maj_at_k < result.pass_at_k[4]  # wrong ones rarely agree
    low, high = result.intervals["maj@4"]
    record = result.metrics()
    assert record["eval_maj_at_k"] == result.maj_at_k
    assert (record["eval_maj_at_k_low"], record["eval_maj_at_k_high"]) == (low, high)
    assert set(record) == {"eval_length", "eval_truncated"} | {
        f"eval_{name}_at_k{bound}"
        for name in ("avg", "pass", "maj")
        for bound in ("", "_low", "_high")
    }
    out = io.StringIO()
    silent = replace(result, maj_at_k=None)
    Console(file=out, width=80).print(result_table({"student": result, "silent": silent}))
    printed = out.getvalue()
    (line,) = [line for line in printed.splitlines() if "maj@4" in line]
    cells = [cell.strip() for cell in line.split("│")]
    assert cells[2:4] == [f"{result.maj_at_k:.1%} ({100 * low:.1f}-{100 * high:.1f})", "-"]


@pytest.fixture
def padded(folders: dict[str, Path], tokenizer: Any, tiny: Any, tmp_path: Path) -> Path:
    """Saves the student with 6 more tokens in its head, which would be sampled almost always."""
    model = tiny("qwen2", seed=1, vocab_size=len(tokenizer) + 6, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 100
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(folders["student"]).save_pretrained(tmp_path / "padded")
    return tmp_path / "padded"


def test_tokens_that_the_teacher_lacks_are_not_sampled(
    folders: dict[str, Path], padded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    highest = []
    generate = sampler.generate_rollouts

    def watch(*args: Any, **named: Any) -> Any:
        out = generate(*args, **named)
        highest.append(max(int(ids.max()) for ids in out.completion_ids))
        return out

    for user in (evaluation, generate_engine):
        monkeypatch.setattr(user, "generate_rollouts", watch)
    alone = EvaluateConfig(
        model=ModelConfig(policy=str(padded), device="cpu"),
        data=DataConfig(path=str(folders["task"])),
        sampling=SAMPLING,
        reward=REWARD,
        samples=1,
    )
    evaluate_sets(alone)
    model = replace(alone.model, teacher=str(folders["teacher"]))
    evaluate_sets(replace(alone, model=model))
    assert highest[0] >= 258 > highest[1]
    held = EvalConfig(data=alone.data, every=1, samples=1, max_problems=5)
    train.main(
        TrainConfig(
            out=padded.with_name("run"),
            steps=1,
            model=model,
            data=alone.data,
            sampling=replace(SAMPLING, prompts_per_step=2, group_size=2),
            reward=REWARD,
            eval=held,
        ),
        Console(file=io.StringIO()),
    )
    assert len(highest) == 4  # the step's, and its evaluation's
    assert max(highest[2:]) < 258


def test_command_writes_table_and_json(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "eval.json"
    code = cli.main(
        [
            "eval",
            *("--model.policy", str(folders["llama"]), "--data.path", str(folders["task"])),
            *("--reward.function", REWARD.function, "--reward.workers", "1"),
            *("--sampling.max-new-tokens", "4", "--samples", "2", "--max-problems", "5"),
            *("--out", str(out), "--model.device", "cpu"),
        ]
    )
    assert code == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["problems"], result["samples"]) == (5, 2)
    assert sum(result["outcomes"].values()) == 10
    assert result["intervals"]["avg@2"][0] <= result["avg_at_k"] <= result["intervals"]["avg@2"][1]
    assert result["pass_at_k"]["1"] == pytest.approx(result["avg_at_k"])
    printed = capsys.readouterr().out
    assert "5 problems, 2 completions each" in printed
    assert f"{result['avg_at_k']:.1%}" in printed


def test_prompts_that_change_each_other_stop_a_measurement(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = evaluation.load_model

    def mixing(*args: Any, **named: Any) -> Any:
        model = load(*args, **named)
        model.model.layers[0].register_forward_hook(
            lambda _module, _inputs, states: states + 0.5 * states.roll(1, dims=0)
        )
        return model

    monkeypatch.setattr(evaluation, "load_model", mixing)
    config = EvaluateConfig(
        model=ModelConfig(policy=str(folders["llama"]), device="cpu"),
        data=DataConfig(path=str(folders["task"])),
        sampling=SAMPLING,
        reward=REWARD,
        samples=1,
        max_problems=4,
    )
    with pytest.raises(EngineError, match=r"set sampling\.batch_size to 1$"):
        evaluate_sets(config)
    assert evaluate_sets(replace(config, max_sampler_mismatch=50.0))["data"].problems == 4


def test_prompts_and_completions_must_fit_the_window(folders: dict[str, Path]) -> None:
    """The model reads 256 tokens, and the prompts have 4 and 6."""
    data = DataConfig(path=str(folders["task"]))
    config = EvaluateConfig(
        model=ModelConfig(policy=str(folders["student"]), device="cpu"),
        data=data,
        sets={"longer": replace(data, prompt_template="{prompt}??")},
        sampling=replace(SAMPLING, max_new_tokens=251),
        reward=REWARD,
    )
    refusal = (
        r"a window of 256 tokens for 6 \+ 251: lower sampling\.max_new_tokens, or sets\.longer"
    )
    with pytest.raises(ValueError, match=refusal):
        evaluation.evaluate_sets(config)


def test_a_gold_answer_that_is_not_read_stops_a_measurement(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "?", "answer": "5 or more"}\n', encoding="utf-8")
    config = EvaluateConfig(
        model=ModelConfig(policy=str(folders["student"]), device="cpu"),
        data=DataConfig(path=str(path)),
        sampling=SAMPLING,
        reward=RewardConfig(workers=1),
    )
    with pytest.raises(ValueError, match=r"first: bad\.jsonl:1, answer '5 or more', error"):
        evaluate_sets(config)


def test_failures_of_the_reward_function_are_shown() -> None:
    rollouts = Rollouts(
        prompt_ids=[torch.tensor([1])] * 2,
        completion_ids=[torch.tensor([1])] * 2,
        logprobs=[torch.zeros(1)] * 2,
        truncated=torch.zeros(2, dtype=torch.bool),
        texts=["", ""],
    )
    judged = Verdicts([1.0, math.nan], ["right", "error"], answers=[None, None])
    out = io.StringIO()
    table = result_table({"policy": summarize(rollouts, judged, 1, 0, 1.0)})
    Console(file=out, width=120).print(table)
    assert "reward function failed" in out.getvalue()
    assert "1, as not right" in out.getvalue()


def test_the_weights_of_a_checkpoint_are_measured(
    config: Callable[..., TrainConfig], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns: list[str] = []
    monkeypatch.setattr(evaluation, "result_table", lambda results: columns.extend(results) or "")
    settings = config(steps=2, optim=OptimConfig(learning_rate=3e-2))
    train.main(settings, Console(file=io.StringIO()))
    saved = settings.out / "checkpoints" / "step_000002"
    student = ModelConfig(policy=str(folders["student"]), device="cpu")
    trained = replace(student, policy=str(settings.out / "model"))
    results = [
        evaluation.main(
            EvaluateConfig(model=model, data=settings.data, sampling=SAMPLING, reward=REWARD)
        )
        for model in (trained, replace(student, weights=saved), student)
    ]
    first, second, third = (replace(result, seconds=0.0) for result in results)
    assert first == second != third
    assert columns == [str(settings.out / "model"), str(saved), str(folders["student"])]
