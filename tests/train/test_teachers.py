"""Runs with several teachers, each of the problems that name it."""

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from kdrl_train import train
from kdrl_train.config import LogConfig, OptimConfig, TrainConfig
from kdrl_train.method.config import MethodConfig, ScheduleConfig, TeacherMethod
from kdrl_train.model.teacher.client import TeacherError
from kdrl_train.runfolder.log import read_records
from tests.train.conftest import EXACT
from tests.train.test_train import without_times
from tests.train.test_two_ranks import assert_same_metrics, gradient, together

Config = Callable[..., TrainConfig]
DISTILLED = replace(EXACT, policy="off")
"""Distillation alone: the gradient is a sum over completions."""
UNCLIPPED = OptimConfig(learning_rate=1e-3, micro_batch_tokens=64, max_grad_norm=math.inf)
NUMBERS = ("kl_teacher", "teacher_log_ratio", "kd_share", "kd_coef")


def run(config: TrainConfig) -> list[dict[str, Any]]:
    train.main(config, Console(file=io.StringIO()))
    return read_records(config.out)


def without(name: str) -> MethodConfig:
    """Make the method in which one teacher has no weight."""
    return replace(DISTILLED, teachers={name: TeacherMethod(kd_weight=0.0)})


def largest(gradient: dict[str, Tensor]) -> float:
    return max(tensor.abs().max().item() for tensor in gradient.values())


def assert_sum(parts: Sequence[dict[str, Tensor]], whole: dict[str, Tensor]) -> None:
    """The parts add up to the whole, and none of them is all of it."""
    for key, tensor in whole.items():
        torch.testing.assert_close(sum(p[key] for p in parts), tensor, rtol=1e-4, atol=1e-6)
    assert min(map(largest, parts)) > 0.05 * largest(whole) > 0


def test_the_gradient_is_that_of_each_teacher_on_its_problems(routed: Config) -> None:
    """It is the sum of two runs, in each of which the other teacher has no weight."""
    settings = {"steps": 1, "optim": UNCLIPPED, "log": LogConfig(diagnostics_every=1)}
    (row,) = run(routed("both", method=DISTILLED, **settings))
    assert row["kd_grad_norm"] == row["kd_grad_norm/default"]  # of the step's first pack
    others = {"default": "other", "other": "default"}
    for name, other in others.items():
        (alone,) = run(routed(name, method=without(other), **settings))
        for key in NUMBERS:
            assert alone[f"{key}/{name}"] == pytest.approx(row[f"{key}/{name}"], rel=1e-6)
        assert (alone[f"kd_coef/{other}"], alone[f"kd_share/{other}"]) == (0, 0)
        assert alone[f"kl_teacher/{other}"] is None
        norms = [one[f"kd_grad_norm/{name}"] for one in (alone, row)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert norms[0] > 0
        assert alone[f"kd_grad_norm/{other}"] is None
    parts = [gradient(routed(name)) for name in others]
    assert_sum(parts, gradient(routed("both")))
    shares = [row["kd_share/default"], row["kd_share/other"]]
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(row["kd_share"])
    mean = sum(
        row[f"kl_teacher/{name}"] * share for name, share in zip(others, shares, strict=True)
    )
    assert mean == pytest.approx(row["kl_teacher"], rel=1e-6)
    lines = (routed("both").out / "samples" / "step_000000.jsonl").read_text().splitlines()
    assert {json.loads(line)["teacher"] for line in lines} == set(others)


@pytest.mark.slow
def test_another_second_teacher_moves_the_gradient_of_its_problems_alone(routed: Config) -> None:
    settings = {"steps": 1, "optim": UNCLIPPED}
    run(routed("default", method=without("other"), **settings))
    run(routed("another", second="llama", method=without("default"), **settings))
    run(routed("both", second="llama", method=DISTILLED, **settings))
    assert_sum(
        [gradient(routed(name)) for name in ("default", "another")], gradient(routed("both"))
    )
    run(routed("other", method=without("default"), **settings))
    ours, theirs = gradient(routed("other")), gradient(routed("another"))
    assert any((ours[key] - theirs[key]).abs().max() > 0.1 * largest(ours) for key in ours)


BUDGET = ScheduleConfig(kind="kl_budget", initial=0.1, target_kl=1.0, gain=0.4, bounds=(0.01, 0.9))
ADAPTED = replace(
    EXACT,
    kd_coef=BUDGET,
    teachers={"other": TeacherMethod(kd_coef=replace(BUDGET, target_kl=9.0), kd_mask="wrong")},
)


@pytest.mark.slow
def test_each_teacher_has_a_budget_of_its_own_also_after_a_resume(
    routed: Config, folders: dict[str, Path]
) -> None:
    whole = run(routed("whole", steps=4, method=ADAPTED))
    first = whole[0]
    assert first["kd_coef/default"] == first["kd_coef/other"] == 0.1
    assert whole[-1]["kd_coef/default"] > 0.1 > whole[-1]["kd_coef/other"]
    parts = routed("parts", steps=2, method=ADAPTED)
    run(parts)
    assert {path.name for path in parts.out.glob("teacher*.json")} == {
        "teacher.json",
        "teacher_other.json",
    }
    resumed = replace(parts, steps=4, resume=True)
    with pytest.raises(TeacherError, match=r"must be that of .*teacher_other\.json, got another"):
        run(replace(resumed, model=replace(parts.model, teachers={"other": str(folders["llama"])})))
    renamed = replace(parts.model, teachers={"new": str(folders["llama"])})
    with pytest.raises(ValueError, match=r"model\.teachers\.other: .* before, absent now"):
        run(replace(resumed, model=renamed, method=EXACT))
    assert without_times(run(resumed)) == without_times(whole)


@pytest.mark.slow
def test_two_ranks_learn_from_the_same_teacher_at_the_same_turn(routed: Config) -> None:
    optim = OptimConfig(learning_rate=1e-3, micro_batch_tokens=32, updates_per_rollout=2)
    settings = {"steps": 2, "save_every": 1, "optim": optim, "method": ADAPTED}
    assert_same_metrics(together(routed("parts", **settings), 2), run(routed("whole", **settings)))
    theirs = gradient(routed("whole"))
    for key, ours in gradient(routed("parts")).items():
        torch.testing.assert_close(ours, theirs[key], rtol=1e-4, atol=1e-7, msg=key)


@pytest.mark.slow
def test_a_reward_takes_the_log_ratio_of_each_teacher(routed: Config) -> None:
    method = replace(EXACT, kd="reward", teachers={"other": TeacherMethod(kd_weight=3.0)})
    (row,) = run(routed("reward", steps=1, method=method))
    (exact,) = run(routed("exact", steps=1, method=replace(EXACT, kd="k2")))
    for name in ("default", "other"):
        key = f"teacher_log_ratio/{name}"
        assert row[key] == pytest.approx(exact[key], rel=1e-6)
    assert (row["kd_coef/default"], row["kd_coef/other"]) == (0.5, 1.5)


@pytest.mark.parametrize(
    ("names", "default", "message"),
    [
        (("", "othr"), True, r"'info\.of' of task-othr\.jsonl:2 must be .* got 'othr'"),
        (("", "other"), False, r"model\.teacher must be set .* got task-other\.jsonl:1, whose"),
        (("", ""), True, r"must be a column that names a teacher, got 'info\.of'"),
    ],
)
def test_problems_without_a_teacher_are_refused_before_a_model_is_loaded(
    routed: Config, names: tuple[str, str], default: bool, message: str
) -> None:
    config = routed(names=names)
    places = {"teacher": config.model.teacher if default else None, "teachers": {"other": "absent"}}
    with pytest.raises(ValueError, match=message):
        run(replace(config, model=replace(config.model, **places)))
    assert not (config.out / "config.yaml").exists()


def test_every_problem_may_name_its_teacher(routed: Config, folders: dict[str, Path]) -> None:
    config = routed(names=("first", "other"), steps=1)
    teachers = config.model.teachers | {"first": str(folders["teacher"])}
    config = replace(config, model=replace(config.model, teacher=None, teachers=teachers))
    (row,) = run(config)
    (twin,) = run(routed("twin", steps=1))
    assert {key for key in row if key.startswith("kd_share/")} == {
        f"kd_share/{t}" for t in teachers
    }
    for name, other in (("first", "default"), ("other", "other")):
        for key in NUMBERS:
            assert row[f"{key}/{name}"] == pytest.approx(twin[f"{key}/{other}"], rel=1e-6)
