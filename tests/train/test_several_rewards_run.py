"""Runs with several rewards: what a step records, ranks, prefetch and resume, eval and report."""

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import pytest

from kdrl_train import cli
from kdrl_train.config import EngineConfig, RewardConfig, TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.method.presets import PRESETS
from kdrl_train.runfolder import jsonl
from tests.train.ranks import train_ranks
from tests.train.step.test_prefetch import fail_in_the_thread
from tests.train.test_two_ranks import alone, assert_same_metrics

WEIGHT, BUFFER, FINE = 2.0, 6, 0.5
SCRIPTED = "tests.train.scripted_rewards"


@pytest.fixture
def several(config: Callable[..., TrainConfig]) -> TrainConfig:
    """A run whose bonus for short completions is first and larger than what decides."""
    short = {"function": f"{SCRIPTED}:short", "weight": WEIGHT}
    right = {"function": f"{SCRIPTED}:early_bytes", "name": "bytes", "decides": True}
    reward = RewardConfig(
        functions=(short, right),  # type: ignore[arg-type] # as a file names them
        workers=1,
        overlong_buffer=BUFFER,
        overlong_penalty=FINE,
    )
    method = replace(PRESETS["kdrl"], kd_mask="wrong")
    return replace(config(steps=1, samples_per_step=16, method=method), reward=reward)


def test_a_step_adds_up_its_rewards_and_masks_by_the_one_that_decides(
    several: TrainConfig,
) -> None:
    (record,) = alone(several)
    samples = jsonl.read(several.out / "samples" / "step_000000.jsonl")
    assert len(samples) == 16
    for sample in samples:
        parts, tokens = sample["rewards"], sample["tokens"]
        assert parts["short"] == 1 / tokens
        assert parts["overlong"] == -FINE * max(tokens - 8 + BUFFER, 0) / BUFFER
        total = WEIGHT * parts["short"] + parts["bytes"] + parts["overlong"]
        assert sample["reward"] == pytest.approx(total)
        assert sample["outcome"] == ("right" if parts["bytes"] > 0.5 else "wrong")
        assert (sample["kd_weight"] > 0) == (sample["outcome"] == "wrong")
    for name in ("short", "bytes", "overlong"):
        mean = fmean(sample["rewards"][name] for sample in samples)
        assert record[f"reward/{name}"] == pytest.approx(mean)
    assert record["reward"] == pytest.approx(fmean(sample["reward"] for sample in samples))
    assert record["accuracy"] == record["reward/bytes"] == record["verifier_right"] / 16
    assert 0 < record["accuracy"] < 1


@pytest.mark.slow
def test_ranks_prefetch_and_resume_keep_the_values_of_each(several: TrainConfig) -> None:
    """Two ranks leave a step's completions in their checkpoint; one process goes on with them."""
    settings = replace(several, steps=4, save_every=2, engine=EngineConfig(staleness=1))
    whole, parts = (replace(settings, out=settings.out / name) for name in ("whole", "parts"))
    expected = alone(whole)
    train_ranks(parts, 2, sabotage=fail_in_the_thread)
    assert_same_metrics(alone(replace(parts, resume=True)), expected)
    page = parts.out / "report.html"
    assert cli.main(["report", str(parts.out), "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert all(f"reward, mean: {name}" in text for name in ("short", "bytes", "overlong"))
    assert "reward/short" in text  # of a completion


def test_check_and_eval_take_several_rewards(
    several: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no cell of the table is wrapped
    several.out.mkdir()
    file = str(several.out / "config.yaml")
    save_yaml(several, several.out / "config.yaml")
    options = ["--config", file, "--reward.functions", f"{SCRIPTED}:fails_on_b", "math"]
    assert cli.main(["check", *options]) == 0
    assert "a value of fails_on_b above 0.5" in capsys.readouterr().out
    options = ["--config", file, "--max-problems", "2", "--samples", "2"]
    assert cli.main(["eval", *options, "--reward.right-above", "-1"]) == 0
    assert "100.0%" in capsys.readouterr().out
