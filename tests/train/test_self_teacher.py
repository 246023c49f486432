"""train with the policy's own weights as teacher: frozen, live or averaged, with another prompt."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from kdrl_train.config import EngineConfig, LogConfig, OptimConfig, TrainConfig
from kdrl_train.method.config import MethodConfig
from kdrl_train.model.load import load_model
from kdrl_train.model.policy import HeadedModel
from kdrl_train.model.teacher.client import TeacherError
from kdrl_train.ranks import ALONE
from kdrl_train.runfolder import checkpoint, jsonl
from kdrl_train.runfolder.best import Best, BestSoFar
from kdrl_train.step import update
from kdrl_train.tools import replay
from tests.train.conftest import EXACT
from tests.train.test_train import run, without_times
from tests.train.test_two_ranks import assert_same_metrics, together

Config = Callable[..., TrainConfig]


def settings(config: Config, out: str, kind: str, **fields: Any) -> TrainConfig:
    """A run that teaches itself, with the gold answer before the problem."""
    template = fields.pop("template", "{answer}!{prompt}")
    decay = {"ema_decay": 0.5} if kind == "ema" else {}
    weights = fields.pop("weights", None)
    made = config(out, steps=fields.pop("steps", 4), save_every=1, keep_checkpoints=9, **fields)
    model = replace(made.model, teacher="self", self_teacher=kind, weights=weights, **decay)
    return replace(made, model=model, data=replace(made.data, teacher_template=template))


def saved(folder: Path, config: TrainConfig, of: str) -> dict[str, Tensor]:
    """Weights of the policy or of the teacher in a checkpoint."""
    model = HeadedModel(load_model(config.model.policy, "", config.model, torch.float32))
    state = {of: get_model_state_dict(model)}
    checkpoint._read_into(state, checkpoint.read(folder), ALONE)
    return state[of]


def test_a_resumed_average_continues_to_the_bit(config: Config) -> None:
    whole = settings(config, "whole", "ema")
    expected = run(whole)
    parts = settings(config, "parts", "ema", steps=2)
    run(parts)
    rows = run(replace(parts, steps=4, resume=True))
    assert without_times(rows) == without_times(expected)
    folders = [c.out / "checkpoints" / "step_000004" for c in (parts, whole)]
    ours, theirs = (saved(folder, whole, "teacher") for folder in folders)
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    start = saved(whole.out / "checkpoints" / "step_000001", whole, "teacher")
    policies = [saved(whole.out / "checkpoints" / f"step_00000{i}", whole, "model") for i in (2, 3)]
    for name, kept in saved(whole.out / "checkpoints" / "step_000003", whole, "teacher").items():
        by_hand = 0.25 * start[name] + 0.25 * policies[0][name] + 0.5 * policies[1][name]
        torch.testing.assert_close(kept, by_hand, rtol=1e-6, atol=1e-7)


def test_frozen_weights_are_those_of_step_0_and_live_ones_are_not(config: Config) -> None:
    frozen, live = (run(settings(config, kind, kind, steps=2)) for kind in ("frozen", "live"))
    assert without_times(frozen)[0] == without_times(live)[0]
    events = (config().out.parent / "live" / "events.jsonl").read_text(encoding="utf-8")
    said = [one["message"] for one in map(json.loads, events.splitlines())]
    assert "the teacher's first prompt: '0!0+0='" in said
    for line in jsonl.read(config().out.parent / "live" / "samples" / "step_000001.jsonl"):
        assert line["teacher_prompt"] == f"{line['answer']}!{line['prompt']}"
    assert frozen[1]["kl_teacher"] != live[1]["kl_teacher"]
    assert frozen[0]["kl_teacher"] > 0.01
    other = run(settings(config, "other", "live", steps=1, template="{prompt}?{answer}"))
    assert other[0]["grad_norm"] != live[0]["grad_norm"]  # only the teacher's prompt has changed


def test_a_copy_without_a_template_is_a_kl_to_step_0(config: Config) -> None:
    rows = run(settings(config, "run", "frozen", steps=2, template=None))
    assert rows[0]["kl_teacher"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["kl_teacher"] > 1e-6


@pytest.mark.slow
def test_weights_of_a_checkpoint_are_those_that_teach(config: Config) -> None:
    first = settings(config, "first", "frozen", steps=3)
    run(first)
    weights = first.out / "checkpoints" / "step_000003"
    second = settings(config, "second", "frozen", steps=1, template=None, weights=weights)
    assert run(second)[0]["kl_teacher"] == pytest.approx(0, abs=1e-6)
    (line, *_) = jsonl.read(second.out / "samples" / "step_000000.jsonl")
    assert "teacher_prompt" not in line
    with pytest.raises(
        ValueError, match=r"must keep the settings .*\n  model\.weights: .* None now"
    ):
        run(settings(config, "second", "frozen", steps=2, template=None, resume=True))
    best = BestSoFar(first.out, 3, {}, first.sampling)
    best.now = Best(3, 0.5)
    best.write()
    named = settings(config, "named", "frozen", steps=1, template=None, weights=best.path)
    assert run(named)[0]["kl_teacher"] == pytest.approx(0, abs=1e-6)
    best.now = Best(2, 0.6)
    best.write()
    with pytest.raises(TeacherError, match="got another one"):  # than it was at step 0
        run(replace(named, steps=2, resume=True))
    other = json.loads((second.out / "teacher.json").read_text(encoding="utf-8"))
    assert other["model"] == "self, frozen"
    assert other["weights"] != json.loads((first.out / "teacher.json").read_text())["weights"]
    (second.out / "teacher.json").write_text(json.dumps(other | {"weights": "0"}))
    with pytest.raises(TeacherError, match="got another one"):
        run(replace(second, steps=2, resume=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["live", "ema"])
def test_a_failed_step_is_repeated_with_its_own_teacher(
    config: Config, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The losses of the completions of the dump, each alone, add up to that of the step."""
    made = settings(config, "run", kind, steps=3)
    stop, losses = update.stop_if_not_finite, []

    def fail(inputs: Any, part: int, loss: float, norm: float) -> None:
        losses.append(loss)
        stop(inputs, part, loss, math.nan if len(losses) == 3 else norm)

    monkeypatch.setattr(update, "stop_if_not_finite", fail)
    with pytest.raises(FloatingPointError):
        run(made)
    file = made.out / "failed_step_000002.pt"
    replayed = replay.main(replay.ReplayConfig(file=file), Console(file=io.StringIO()))
    assert sum(one.loss for one in replayed) == pytest.approx(losses[2], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("live", {"optim": OptimConfig(learning_rate=1e-3, updates_per_rollout=2)}),
        ("ema", {"engine": EngineConfig(staleness=1)}),
        ("live", {"engine": EngineConfig(staleness=1), "method": replace(EXACT, kd="k2")}),
        ("live", {"method": replace(EXACT, sampler_correction="truncate")}),
        ("live", {"method": MethodConfig(kd="reward")}),
    ],
)
def test_what_it_goes_with(config: Config, kind: str, fields: dict[str, Any]) -> None:
    rows = run(settings(config, "run", kind, steps=2, **fields))
    assert all(row["kl_teacher"] > 1e-3 for row in rows)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "live and measured": (  # the first micro-batches of all ranks: here the whole step
        "live",
        {
            "log": LogConfig(diagnostics_every=1),
            "optim": OptimConfig(learning_rate=1e-3, micro_batch_tokens=9999),
        },
    ),
    "ema": ("ema", {"optim": OptimConfig(learning_rate=1e-3, micro_batch_tokens=1)}),
}


def without_percentiles(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what jumps from one edge of a histogram to the next by rounding."""
    names = ("teacher_log_ratio_p", "teacher_log_ratio_counts")
    return [{k: v for k, v in record.items() if not k.startswith(names)} for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_learn_what_one_process_learns(config: Config, name: str) -> None:
    kind, fields = VARIANTS[name]
    whole, parts = (settings(config, out, kind, steps=2, **fields) for out in ("whole", "parts"))
    assert_same_metrics(without_percentiles(together(parts, 2)), without_percentiles(run(whole)))
    folders = [c.out / "checkpoints" / "step_000002" for c in (parts, whole)]
    for of in ("model", "teacher") if kind == "ema" else ("model",):
        ours, theirs = (saved(folder, whole, of) for folder in folders)
        for key, weight in theirs.items():
            if not key.endswith("k_proj.bias"):  # which has no gradient but rounding
                assert (ours[key] - weight).abs().mean() < 1e-6, (of, key)
