"""train with states or likeliest tokens from a server: the run of the teacher in this process."""

import io
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdrl_train.config import EngineConfig, LogConfig, OptimConfig, TeacherConfig, TrainConfig
from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.runfolder.log import read_records
from kdrl_train.tools import replay
from tests.train.servers import running, teacher_app
from tests.train.test_train_remote import assert_same_run, on_step, run
from tests.train.test_two_ranks import assert_same_metrics, together

Config = Callable[..., TrainConfig]
HALF = ScheduleConfig(initial=0.5, final=0.5)
RKL = MethodConfig(kd="rkl", kd_coef=HALF)
RUNS: dict[str, dict[str, Any]] = {
    "rkl, wrong alone, two updates": {
        "method": replace(RKL, kd_mask="wrong"),
        "optim": OptimConfig(learning_rate=1e-3, micro_batch_tokens=64, updates_per_rollout=2),
    },
    "a mixture, stale, corrected, measured": {
        "method": replace(RKL, kd="rkl+fkl", sampler_correction="truncate"),
        "engine": EngineConfig(staleness=1),
        "log": LogConfig(diagnostics_every=1),
    },
    "topk": {
        "method": replace(RKL, kd="topk_rkl", kd_topk=5),
        "log": LogConfig(diagnostics_every=1),
    },
}
PLAIN = ("rkl, wrong alone, two updates",)


def behind(config: TrainConfig, url: str, folders: dict[str, Path]) -> TrainConfig:
    """Put the teacher of a run behind a URL."""
    out = config.out.with_name(f"{config.out.name}_remote")
    head = TeacherConfig(head=str(folders["teacher"]))
    return replace(config, out=out, model=replace(config.model, teacher=url), teacher=head)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in PLAIN else pytest.mark.slow) for x in RUNS]
)
def test_a_run_is_that_of_the_teacher_in_process(
    config: Config, folders: dict[str, Path], name: str
) -> None:
    local = config("local", steps=2, **RUNS[name])
    local = replace(local, sampling=replace(local.sampling, max_new_tokens=4))
    with running(teacher_app(folders["teacher"])) as url:
        remote = behind(local, url, folders)
        records, _ = run(remote)
    expected, _ = run(local)
    assert_same_run(remote.out, local.out)
    shares = [record["kd_share"] for record in records]
    assert all((0 < share < 1) == (local.method.kd_mask == "wrong") for share in shares)
    for key in ("topk_divergence", "kd_grad_norm", "rl_kd_cosine"):
        for record, other in zip(records, expected, strict=True):
            value = other.get(key)
            assert record.get(key) == (value and pytest.approx(value, rel=1e-4)), key


@pytest.mark.slow
def test_a_broken_step_is_replayed_with_the_states_of_the_server(
    config: Config, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dump holds no states: replay asks for them again, and finds the gradients of the step."""
    advantages = grpo.advantages

    def broken(*arguments: Any) -> Tensor:
        values_R = advantages(*arguments)
        values_R[3] = math.inf
        return values_R

    monkeypatch.setattr(grpo, "advantages", broken)
    local = config("local", steps=1, method=replace(RKL, kd_mask="wrong"))
    norms = []
    with running(teacher_app(folders["teacher"])) as url:
        for settings in (behind(local, url, folders), local):
            with pytest.raises(FloatingPointError, match="replay --file"):
                run(settings)
            dump = replay.ReplayConfig(file=settings.out / "failed_step_000000.pt")
            replayed = replay.main(dump, Console(file=io.StringIO()))
            norms.append({one.index: one.grad_norm for one in replayed if one.finite})
            assert any(one.kd_weight > 0 for one in replayed if one.finite)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert len(norms[0]) == 15


@pytest.mark.slow
def test_two_ranks_keep_the_states_of_their_own_packs(
    config: Config, folders: dict[str, Path]
) -> None:
    """Two updates of a step, whose packs differ, and a prefetch that must not ask for others."""
    settings = {
        "method": replace(RKL, kd="rkl+fkl"),
        "optim": OptimConfig(learning_rate=1e-3, micro_batch_tokens=32, updates_per_rollout=2),
        "engine": EngineConfig(staleness=1),
    }
    local = config("local", steps=2, **settings)
    with running(teacher_app(folders["teacher"])) as url:
        parts = behind(local, url, folders)
        records = together(parts, 2)
    run(local)
    assert_same_metrics(records, read_records(local.out))


@pytest.mark.slow
def test_a_resumed_run_asks_for_states_again(
    config: Config, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint holds the completions of the next step, and none of their states."""
    whole = config("whole", steps=4, method=RKL, engine=EngineConfig(staleness=1))
    with running(teacher_app(folders["teacher"])) as url:
        whole = behind(whole, url, folders)
        parts = replace(whole, out=whole.out.with_name("parts"))
        run(whole)
        with monkeypatch.context() as patch:
            on_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert len(run(parts)[0]) == 2
        rollouts = parts.out / "checkpoints" / "step_000002" / "rollouts.pt"
        assert 0 < rollouts.stat().st_size < 100_000
        run(replace(parts, resume=True))
    assert_same_run(parts.out, whole.out)


def test_the_head_of_another_model_of_one_shape_is_refused(
    config: Config, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Its shape, scale and softcap are right: its scores are not."""
    wrong = shutil.copytree(folders["teacher"], tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, dims=0)
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    with running(teacher_app(folders["teacher"])) as url:
        settings = behind(config("run", steps=1, method=RKL), url, {"teacher": wrong})
        with pytest.raises(
            ValueError, match=r"served head: teacher\.head must be the head of .* nats"
        ):
            run(settings)


@pytest.mark.slow
@pytest.mark.parametrize("kd", ["rkl", "topk_rkl"])
def test_states_are_those_after_the_teachers_prompt(
    config: Config, folders: dict[str, Path], kd: Any
) -> None:
    local = config("local", steps=1, method=replace(RKL, kd=kd))
    local = replace(local, data=replace(local.data, teacher_template="{answer}!{prompt}"))
    with running(teacher_app(folders["teacher"])) as url:
        remote = behind(local, url, folders)
        (record,), _ = run(remote)
    run(local)
    assert_same_run(remote.out, local.out)
    plain = replace(local, out=local.out.with_name("plain"), data=config().data)
    (other,), _ = run(plain)
    assert other["grad_norm"] != pytest.approx(record["grad_norm"], rel=1e-3)
