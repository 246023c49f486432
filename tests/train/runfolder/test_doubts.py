"""A run that has stopped to learn is warned, once and with what to look at."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kdrl_train import train
from kdrl_train.config import OptimConfig, TrainConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.doubts import Doubts
from kdrl_train.runfolder.log import RunLog
from tests.train.run_folders import record


def doubts_of(count: int, **values: Any) -> list[tuple[int, str]]:
    """The doubts about records with these values, each with its number of records."""
    doubts = Doubts()
    rows = [record(step, teacher=False) | {"policy_coef": 1.0} | values for step in range(count)]
    return [(row["step"] + 1, doubt) for row in rows for doubt in doubts.add(row)]


def test_no_group_with_signal_is_said_once() -> None:
    assert doubts_of(250) == []
    silent = {"groups_with_signal": 0.0, "reward": 0.0, "grad_norm": 0.0}
    assert doubts_of(99, **silent) == []
    ((steps, doubt),) = doubts_of(250, **silent)
    assert steps == 100
    assert "got none in 100 steps up to step 100 (signal 0%, reward 0.000)" in doubt
    for coefficient in (0.0, None):  # distillation alone needs none
        assert doubts_of(250, groups_with_signal=0.0, policy_coef=coefficient) == []


def test_late_rewards_are_said_once() -> None:
    doubts = Doubts()
    counts = {"verifier_right": 4, "verifier_wrong": 32, "verifier_timeout": 4}
    assert doubts.add(record(0) | counts) == []  # a tenth
    (message,) = doubts.add(record(1) | counts | {"verifier_timeout": 5})
    assert "got 5 of 41 completions of step 2" in message
    assert doubts.add(record(2) | counts | {"verifier_timeout": 40}) == []


def test_a_gradient_of_zero_is_said_once() -> None:
    ((steps, doubt),) = doubts_of(9, grad_norm=0.0)
    assert steps == 3
    assert "got 0 in 3 steps up to step 3 (entropy 1.200 nats, signal 50%)" in doubt
    saturated = {"groups_with_signal": 0.0, "grad_norm": 0.0, "entropy": 0.01}
    assert [steps for steps, _ in doubts_of(9, **saturated)] == [3]
    assert doubts_of(9, grad_norm=1e-30) == []
    ((steps, doubt),) = doubts_of(9, grad_norm=1.2e-5, entropy=1e-16)  # of a learning rate of 10
    assert steps == 3
    assert "got 1.2e-05 in 3 steps up to step 3 (entropy 0.000 nats" in doubt
    assert doubts_of(9, grad_norm=3.1, entropy=1e-16) == []  # it may come back
    assert doubts_of(9, grad_norm=1.2e-5, entropy=None) == []
    doubts = Doubts()
    for step in range(20):  # never three in a row
        assert doubts.add(record(step) | {"grad_norm": float(step % 3 == 0)}) == []


def test_a_noisy_sketch_is_said_once() -> None:
    assert doubts_of(9, sketch_noise=0.5) == doubts_of(9, sketch_noise=None) == []
    ((steps, doubt),) = doubts_of(9, sketch_noise=0.6)
    assert steps == 3
    assert "sketch_noise should be below 0.1, got 0.60 at step 3" in doubt


def test_the_log_warns_and_a_resumed_one_not_again(tmp_path: Path) -> None:
    said = io.StringIO()
    for first in (0, 4):
        log = RunLog(tmp_path, first, 9, Console(file=said, width=10_000))
        for step in range(first, first + 5):
            log.step(record(step) | {"grad_norm": 0.0})
    (warning,) = jsonl.read(tmp_path / "events.jsonl")
    assert (warning["event"], warning["step"]) == ("warning", 3)
    assert said.getvalue().count(warning["message"]) == 1


@pytest.mark.slow  # trains
@pytest.mark.fault("weights or gradient not finite")
def test_a_huge_learning_rate_warns(config: Callable[..., TrainConfig]) -> None:
    optim = OptimConfig(learning_rate=1e3, micro_batch_tokens=64)
    settings = config(steps=5, save_every=1, optim=optim, method=PRESETS["grpo"])
    lines = io.StringIO()
    train.main(settings, Console(file=lines, width=10_000))
    train.main(replace(settings, steps=7, resume=True), Console(file=lines, width=10_000))
    warnings = [e for e in jsonl.read(settings.out / "events.jsonl") if e["event"] == "warning"]
    warnings = [e for e in warnings if not e["message"].startswith("settings: ")]
    assert [warning["step"] for warning in warnings] == [4]  # steps 2 to 4 had |g| = 0
    assert warnings[0]["message"].startswith("|g| must not stay 0, got 0 in 3 steps up to step 4")
    assert lines.getvalue().count("|g| must not stay 0") == 1
