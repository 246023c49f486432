"""Several teachers, some of them behind URLs, teach what they teach in one process."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from rich.console import Console
from torch import Tensor

from kdrl_train.config import EngineConfig, TeacherConfig, TrainConfig
from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig, ScheduleConfig, TeacherMethod
from kdrl_train.runfolder.log import read_records
from kdrl_train.tools import replay
from tests.train.servers import running, teacher_app
from tests.train.test_teachers import run
from tests.train.test_train_remote import assert_same_run

METHOD = MethodConfig(
    kd="k2",
    kd_coef=ScheduleConfig(initial=0.5, final=0.5),  # known early, so asked while rewards are made
    teachers={"other": TeacherMethod(kd_mask="wrong", kd_weight=2.0)},  # not
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kd", "staleness", "names"),
    [("k2", 1, ("remote",)), ("rkl", 0, ("mixed", "remote")), ("topk_rkl", 0, ("mixed",))],
)
def test_a_server_beside_a_teacher_in_process(
    routed: Callable[..., TrainConfig],
    folders: dict[str, Path],
    kd: Any,
    staleness: int,
    names: tuple[str, ...],
) -> None:
    method = replace(METHOD, kd=kd, kd_topk=5 if kd == "topk_rkl" else METHOD.kd_topk)
    settings = {"method": method, "engine": EngineConfig(staleness=staleness), "steps": 2}
    heads = TeacherConfig()
    if kd == "rkl":
        of_other = {"other": str(folders["other_teacher"])}
        heads = TeacherConfig(head=str(folders["teacher"]), heads=of_other)
    local = routed("local", **settings)
    run(local)
    apps = [teacher_app(folders[name]) for name in ("other_teacher", "teacher")]
    with running(apps[0]) as url, running(apps[1]) as default:
        beside = replace(local.model, teachers={"other": url})
        models = {"mixed": beside, "remote": replace(beside, teacher=default)}
        for name in names:
            config = replace(local, out=local.out.parent / name, model=models[name], teacher=heads)
            run(config)
            assert_same_run(config.out, local.out)
            pairs = zip(read_records(config.out), read_records(local.out), strict=True)
            for ours, theirs in pairs:
                assert ours["kd_coef/other"] == 1.0
                for key in ("kl_teacher/default", "kl_teacher/other", "kd_share/other"):
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("kd", ["rkl", "topk_rkl"])
def test_a_replay_asks_the_server_for_what_the_dump_does_not_hold(
    routed: Callable[..., TrainConfig],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    kd: Any,
) -> None:
    method = replace(METHOD, kd=kd, kd_topk=5 if kd == "topk_rkl" else METHOD.kd_topk)
    local = routed("local", method=method, steps=1)
    advantages = grpo.advantages

    def broken(*arguments: Any) -> Tensor:
        values_R = advantages(*arguments)
        values_R[3] = torch.inf
        return values_R

    monkeypatch.setattr(grpo, "advantages", broken)
    with running(teacher_app(folders["other_teacher"])) as url:
        heads = TeacherConfig(heads={"other": str(folders["other_teacher"])})
        remote = replace(local, model=replace(local.model, teachers={"other": url}), teacher=heads)
        replays = []
        for config in (local, replace(remote, out=local.out.with_name("remote"))):
            with pytest.raises(FloatingPointError):
                run(config)
            file = config.out / "failed_step_000000.pt"
            replays.append(replay.main(replay.ReplayConfig(file=file), Console(file=io.StringIO())))
    assert len(replays[0]) == 16
    for one, other in zip(*replays, strict=True):
        assert one.finite == other.finite == (one.index != 3)
        if one.finite:
            assert other.loss == pytest.approx(one.loss, rel=1e-5, abs=1e-6)
            assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
