"""The estimate of a run whose teacher is behind a URL, of which the head is here."""

import pytest

from kdrl_train.config import DataConfig, ModelConfig, TeacherConfig, TrainConfig
from kdrl_train.method.config import MethodConfig
from kdrl_train.tools.plan import command
from kdrl_train.tools.plan.command import Estimate, PlanConfig

V, H = 152_064, 3_584


def planned(models: dict[str, str], method: MethodConfig, teacher: str, **device: str) -> Estimate:
    model = ModelConfig(policy=models["7b"], teacher=teacher, dtype="bfloat16")
    head = TeacherConfig(head=models["7b"])
    return command.make_estimate(
        PlanConfig(model=model, teacher=head, method=method, gpus=64, **device)
    )


def test_a_served_head_is_counted_and_its_model_is_not(models: dict[str, str]) -> None:
    url, method = "http://host:1", MethodConfig(kd="rkl")
    served, local = (planned(models, method, teacher) for teacher in (url, models["7b"]))
    terms, theirs = ({term.name: term for term in one.memory} for one in (served, local))
    assert terms["head of a served teacher"].value == 2 * V * H
    assert "teacher" in theirs
    assert "teacher" not in terms
    for name in ("teacher's hidden states", "workspace of the head"):
        assert terms[name].value == theirs[name].value, name
    assert "states from a server" not in terms  # they wait in the memory of the CPU
    gemm = [{t.name: t.value for t in one.time}["head, teacher's GEMM"] for one in (served, local)]
    assert gemm[0] == gemm[1] > 0
    assert not [term for term in served.time if term.name == "teacher, forward"]
    sampled = planned(models, MethodConfig(kd="k2"), url)
    assert "head of a served teacher" not in {term.name for term in sampled.memory}


def test_the_pass_that_finds_the_likeliest_tokens_is_counted(models: dict[str, str]) -> None:
    exact, topk = (planned(models, MethodConfig(kd=kd), models["7b"]) for kd in ("rkl", "topk_rkl"))
    times = [{term.name: term.value for term in one.time} for one in (exact, topk)]
    name = "head, teacher's GEMM"
    assert times[1][name] == pytest.approx(times[0][name])
    served = planned(models, MethodConfig(kd="topk_rkl"), "http://host:1")
    assert name not in {term.name for term in served.time}


def test_the_heads_of_several_teachers_are_named() -> None:
    teachers = {"math": "http://host:2", "code": "folder"}
    model = ModelConfig(policy="p", teacher="http://host:1", teachers=teachers)
    rest = {
        "model": model,
        "data": DataConfig(teacher_column="t"),
        "method": MethodConfig(kd="rkl"),
    }
    with pytest.raises(ValueError, match=r"teacher\.heads\.math must be set for method\.kd"):
        TrainConfig(teacher=TeacherConfig(head="h"), **rest)
    TrainConfig(teacher=TeacherConfig(head="h", heads={"math": "m"}), **rest)
