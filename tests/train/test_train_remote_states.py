"""train with states or likeliest tokens from a server: the run of the teacher in this process."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from kdrl_train.config import EngineConfig, LogConfig, OptimConfig, TeacherConfig, TrainConfig
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from tests.train.servers import running, teacher_app
from tests.train.test_train_remote import assert_same_run, run

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
    "jsd": {"method": replace(RKL, kd="jsd")},
    "centred k2, masked": {"method": replace(RKL, kd="k2", kd_baseline="kl", kd_mask="wrong")},
    "topk_fkl, wrong alone, stale": {
        "method": replace(RKL, kd="topk_fkl", kd_topk=5, kd_mask="wrong"),
        "engine": EngineConfig(staleness=1),
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
