"""Whole runs with losses of method/losses.py and of one's own: ranks, updates, resume."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kdrl_train import cli
from kdrl_train.config import EngineConfig, LogConfig, OptimConfig, TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.runfolder.log import read_records
from kdrl_train.tools import replay
from tests.train import own_losses
from tests.train.test_tensor_parallel import split, split_config
from tests.train.test_train import run, weights, without_times
from tests.train.test_two_ranks import alone, assert_same_metrics, together

Config = Callable[..., TrainConfig]
__all__ = ["split_config"]  # a fixture
HERE = own_losses.__name__
KD = ScheduleConfig(initial=0.3, final=0.3)
UPDATES = OptimConfig(learning_rate=1e-2, micro_batch_tokens=64, updates_per_rollout=2)
OWN = MethodConfig(loss=f"{HERE}:kdrl", kd_coef=KD)
METHODS = {
    "own, of completions": MethodConfig(
        loss=f"{HERE}:early", kd=None, loss_options={"half_life": 3.0}, token_weights="constant"
    ),
    "gspo, selected": MethodConfig(
        policy="gspo",
        clip_low=0.02,
        clip_high=0.02,
        token_weights="sequence_mean",
        kd="rkl",
        kd_coef=KD,
        kd_sign_gate=True,
        kd_min_log_ratio=0.2,
        kd_mask="wrong",
    ),
}


def test_a_loss_of_ones_own_trains_as_the_built_in_one(config: Config) -> None:
    built_in = MethodConfig(kd_coef=KD)
    ours, theirs = (
        run(config(name, method=method, optim=UPDATES, steps=2))
        for name, method in (("own", OWN), ("built_in", built_in))
    )
    for record, expected in zip(without_times(ours), without_times(theirs), strict=True):
        none = {"clip_fraction": None, "kd_flip_share": None}
        values = {k: v and pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in expected.items()}
        assert record == values | none


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(config: Config) -> None:
    settings = {"method": METHODS["gspo, selected"], "optim": UPDATES, "steps": 2}
    whole, parts = (config(out, **settings) for out in ("whole", "parts"))
    expected = alone(whole)
    assert_same_metrics(together(parts, 2), expected)
    assert expected[1]["clip_fraction"] > 0
    assert 0 < expected[1]["kd_selected"] < 1


@pytest.mark.slow
def test_two_stale_ranks_measure_a_loss_of_ones_own(config: Config) -> None:
    settings = {
        "method": METHODS["own, of completions"],
        "optim": replace(UPDATES, micro_batch_tokens=9999),
        "log": LogConfig(diagnostics_every=1),
        "engine": EngineConfig(staleness=1),
        "steps": 2,
    }
    whole, parts = (config(out, **settings) for out in ("whole", "parts"))
    expected = alone(whole)
    assert_same_metrics(together(parts, 2), expected)
    assert {record[name] for record in expected for name in ("clip_fraction", "rl_grad_norm")} == {
        None
    }


@pytest.mark.slow
def test_split_vocabularies_learn_what_one_process_learns(split_config: Config) -> None:
    settings = {"method": METHODS["gspo, selected"], "steps": 1}
    whole, parts = (split_config("qwen3", True, out, **settings) for out in ("whole", "parts"))
    assert_same_metrics(together(split(parts), 2), alone(whole))


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(config: Config) -> None:
    settings = {"method": METHODS["gspo, selected"], "optim": UPDATES, "steps": 2}
    whole, parts = config("whole", **settings), config("parts", **settings)
    expected = run(whole)
    run(replace(parts, steps=1))
    assert without_times(run(replace(parts, resume=True))) == without_times(expected)
    ours, theirs = weights(parts.out / "model"), weights(whole.out / "model")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.slow
def test_other_commands_take_these_methods(config: Config, tmp_path: Path) -> None:
    settings = config("run", method=METHODS["gspo, selected"], optim=UPDATES, steps=2)
    run(settings)
    file = ["--config", str(settings.out / "config.yaml")]
    for command in (["plan", *file], ["check", *file, "--out", str(tmp_path / "other")]):
        assert cli.main(command) == 0, command
    assert cli.main(["report", str(settings.out), "--out", str(tmp_path / "a.html")]) == 0
    assert read_records(settings.out)[1]["kd_selected"] is not None


@pytest.mark.fault("hostile config or data")
def test_a_failed_step_of_others_imports_no_installed_module(
    config: Config, tmp_path: Path
) -> None:
    save_yaml(
        config(method=MethodConfig(loss="antigravity:fly", kd=None)), tmp_path / "config.yaml"
    )
    dump: dict[str, Any] = {"part": 0}
    with pytest.raises(ValueError, match=r"method.loss in .*config\.yaml must be a function in"):
        replay.replay(dump, tmp_path, Console(file=io.StringIO()))
