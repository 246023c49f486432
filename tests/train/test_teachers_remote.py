"""Several teachers, some of them behind URLs, teach what they teach in one process."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from kdrl_train.config import EngineConfig, TeacherConfig, TrainConfig
from kdrl_train.method.config import MethodConfig, ScheduleConfig, TeacherMethod
from kdrl_train.runfolder.log import read_records
from tests.train.servers import running, teacher_app
from tests.train.test_teachers import run
from tests.train.test_train_remote import assert_same_run

METHOD = MethodConfig(
    kd="k2",
    kd_coef=ScheduleConfig(initial=0.5, final=0.5),  # known early, so asked while rewards are made
    teachers={"other": TeacherMethod(kd_mask="wrong", kd_weight=2.0)},  # not
)


@pytest.mark.slow
@pytest.mark.parametrize(("kd", "staleness"), [("k2", 1), ("rkl", 0), ("topk_rkl", 0)])
def test_a_server_beside_a_teacher_in_process(
    routed: Callable[..., TrainConfig], folders: dict[str, Path], kd: Any, staleness: int
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
        for name, model in {
            "mixed": replace(local.model, teachers={"other": url}),
            "remote": replace(local.model, teacher=default, teachers={"other": url}),
        }.items():
            config = replace(local, out=local.out.parent / name, model=model, teacher=heads)
            run(config)
            assert_same_run(config.out, local.out)
            pairs = zip(read_records(config.out), read_records(local.out), strict=True)
            for ours, theirs in pairs:
                assert ours["kd_coef/other"] == 1.0
                for key in ("kl_teacher/default", "kl_teacher/other", "kd_share/other"):
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
