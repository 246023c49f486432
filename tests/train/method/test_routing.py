"""Weights, schedules and metrics of several teachers, by hand."""

import pytest
import torch

from kdrl_train.method.config import MethodConfig, ScheduleConfig, TeacherMethod
from kdrl_train.method.histogram import histogram
from kdrl_train.method.metrics import add_sums, teacher_sums, token_means
from kdrl_train.method.routing import routed_metrics, routed_weights
from kdrl_train.method.schedules import History, rebuild_history, scheduled_coefs

NAMES = ("default", "math", "code")
METHOD = MethodConfig(
    kd_coef=ScheduleConfig(initial=0.5),
    teachers={
        "math": TeacherMethod(kd_mask="wrong", kd_weight=2.0),
        "code": TeacherMethod(kd_coef=ScheduleConfig(kind="reward_adaptive", initial=0.25)),
    },
)
RIGHT = torch.tensor([[True, False], [True, False], [True, True], [True, False]])
NUMBERS = torch.tensor([0, 1, 2, 2])


def test_each_group_is_weighted_by_its_teacher() -> None:
    betas = scheduled_coefs(METHOD, 0, None, NAMES).teachers
    assert betas == (0.5, 1.0, 0.25)
    weights = routed_weights(METHOD, betas, RIGHT.double(), RIGHT, NUMBERS, NAMES)
    # default: all; math: wrong ones; code: 4p(1 - p) of its groups, 0 and 1
    assert weights.kd_weight.tolist() == [0.5, 0.5, 0.0, 1.0, 0.0, 0.0, 0.25, 0.25]
    assert weights.kd_coefs == [0.5, 1.0, 0.125]
    assert weights.kd_coef == (0.5 + 1.0 + 0.0 + 0.25) / 4
    metrics = routed_metrics(METHOD, weights, 1.0, NAMES)
    of_teachers = {"kd_coef/default": 0.5, "kd_coef/math": 1.0, "kd_coef/code": 0.125}
    assert metrics == {"kd_coef": weights.kd_coef, "policy_coef": 1.0} | of_teachers
    alone = routed_weights(METHOD, (0.5,), RIGHT.double(), RIGHT, torch.zeros(4))
    assert alone.kd_weight.tolist() == [0.5] * 8
    assert routed_metrics(METHOD, alone, 1.0) == {"kd_coef": 0.5, "policy_coef": 1.0}
    absent = routed_weights(METHOD, betas, RIGHT.double(), RIGHT, torch.zeros(4), NAMES)
    assert absent.kd_coefs == [0.5, None, None]


def test_a_budget_reads_the_kl_to_its_teacher_alone() -> None:
    budget = ScheduleConfig(kind="kl_budget", initial=0.1, target_kl=1.0, gain=0.5)
    method = MethodConfig(kd_coef=budget, teachers={"code": TeacherMethod(kd_weight=2.0)})
    records = [
        {"step": 0, "kl_teacher": 9.0, "kl_teacher/default": 2.0, "kl_teacher/code": None},
        {"step": 1, "kl_teacher": 9.0, "kl_teacher/default": 0.0, "kl_teacher/code": 0.5},
    ]
    history = rebuild_history(method.schedules, records, 2, 0)
    betas = scheduled_coefs(method, 2, history, ("default", "code")).teachers
    assert betas == pytest.approx((0.1 * 1.5 * 0.5, 2 * 0.1 * 0.75))
    live = History()
    for record in records:
        live.add(record)
    assert scheduled_coefs(method, 2, live, ("default", "code")).teachers == betas


def test_metrics_of_each_teacher_are_means_over_its_tokens() -> None:
    packs = [("default", 4.0, 2.0, 6.0), ("code", 1.0, 3.0, 4.0), ("default", 0.0, 0.0, 2.0)]
    sums: dict[str, torch.Tensor] = {}
    for name, count, ratio, tokens in packs:
        part = {"kd_tokens": count, "teacher_log_ratio_sum": ratio, "tokens": tokens}
        pack = {key: torch.tensor(value).double() for key, value in part.items()}
        sums = add_sums(add_sums(sums, pack), teacher_sums(pack, name))
    sums["teacher_log_ratio_histogram"] = histogram(torch.zeros(5).double())
    means = token_means(sums, NAMES)
    assert (means["kl_teacher/default"], means["kl_teacher/code"]) == (0.5, 3.0)
    assert means["teacher_log_ratio/code"] == 3.0
    assert means["kl_teacher/math"] is means["teacher_log_ratio/math"] is None
    shares = [means[f"kd_share/{name}"] for name in NAMES]
    assert shares == [4 / 12, 0.0, 1 / 12]
    exact = sums | {"kl_sum/code": torch.tensor(0.5)}
    assert token_means(exact, NAMES)["kl_teacher/code"] == 0.5
    assert not any("/" in key for key in token_means(exact))
