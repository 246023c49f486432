"""evaluate: unbiased pass@k, and numbers that come from the completions."""

import io
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdrl_train import cli, rollout, train
from kdrl_train import evaluate as evaluation
from kdrl_train.config import (
    DataConfig,
    EvalConfig,
    EvaluateConfig,
    ModelConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.data import load_examples
from kdrl_train.evaluate import evaluate, evaluate_folder, pass_at_k
from kdrl_train.verifier import Verifier
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


def test_a_measurement_of_a_model(folders: dict[str, Path], tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["student"])
    data = DataConfig(path=str(folders["task"]))
    examples = load_examples(data)
    with Verifier(REWARD) as verifier:

        def measure(**changes: Any) -> Any:
            settings = {"data": data, "sampling": SAMPLING, "verifier": verifier, "samples": 3}
            return evaluate(model, tokenizer, examples, **settings | changes)

        result = measure()
        assert (result.problems, result.samples) == (20, 3)
        assert sum(result.outcomes.values()) == 60
        assert result.avg_at_k == pytest.approx(result.outcomes["right"] / 60)
        assert list(result.pass_at_k) == [1, 2, 3]
        assert result.pass_at_k[1] == pytest.approx(result.avg_at_k)
        assert 0 < result.pass_at_k[1] < result.pass_at_k[2] < result.pass_at_k[3] <= 1
        assert 0 < result.truncated <= 1
        assert 7 < result.mean_length <= 8
        again, other = measure(), measure(seed=1)
        assert (again.avg_at_k, again.mean_length) == (result.avg_at_k, result.mean_length)
        assert other.outcomes != result.outcomes
        with pytest.raises(ValueError, match="at least one problem, got none"):
            evaluate(
                model, tokenizer, [], data=data, sampling=SAMPLING, verifier=verifier, samples=1
            )


@pytest.fixture
def padded(folders: dict[str, Path], tokenizer: Any, tiny: Any, tmp_path: Path) -> Path:
    """The student with 6 columns of padding, whose logits are all but sure to be drawn."""
    model = tiny("qwen2", seed=1, vocab_size=len(tokenizer) + 6, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 100
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(folders["student"]).save_pretrained(tmp_path / "padded")
    return tmp_path / "padded"


def test_columns_that_the_teacher_lacks_are_not_drawn(
    folders: dict[str, Path], padded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    highest = []
    generate = rollout.generate_rollouts

    def watch(*args: Any, **named: Any) -> Any:
        out = generate(*args, **named)
        highest.append(max(int(ids.max()) for ids in out.completion_ids))
        return out

    monkeypatch.setattr(evaluation, "generate_rollouts", watch)
    own = EvaluateConfig(
        model=ModelConfig(policy=str(padded), device="cpu"),
        data=DataConfig(path=str(folders["task"])),
        sampling=SAMPLING,
        reward=REWARD,
        samples=1,
    )
    evaluate_folder(own)
    model = replace(own.model, teacher=str(folders["teacher"]))
    evaluate_folder(replace(own, model=model))
    assert highest[0] >= 258 > highest[1]
    held = EvalConfig(data=own.data, every=1, samples=1, max_problems=5)
    train.main(
        TrainConfig(
            out=padded.with_name("run"),
            steps=1,
            model=model,
            data=own.data,
            sampling=replace(SAMPLING, prompts_per_step=2, group_size=2),
            reward=REWARD,
            eval=held,
        ),
        Console(file=io.StringIO()),
    )
    assert len(highest) == 3
    assert highest[2] < 258


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
    assert result["pass_at_k"]["1"] == pytest.approx(result["avg_at_k"])
    printed = capsys.readouterr().out
    assert "5 problems, 2 completions each" in printed
    assert f"{result['avg_at_k']:.1%}" in printed
