"""Which settings a teacher behind a URL can serve, and when it is queried."""

import re
from dataclasses import replace

import pytest

from kdrl_train.config import ModelConfig, SamplingConfig, TeacherConfig, TrainConfig
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.schedules import History
from kdrl_train.model.teacher.remote import may_query_early


@pytest.mark.parametrize(
    ("mask", "beta", "early"),
    [("none", 0.1, True), ("none", 0.0, False), ("wrong", 0.1, False), ("wrong_group", 0.1, False)],
)
def test_a_mask_waits_for_the_rewards(mask: str, beta: float, early: bool) -> None:
    coefficient = ScheduleConfig(initial=beta, final=beta)
    assert may_query_early(MethodConfig(kd_mask=mask, kd_coef=coefficient), 0, History()) is early
    assert not may_query_early(MethodConfig(kd=None), 0, History())
    annealed = ScheduleConfig(kind="linear", initial=0.1, final=0.0, steps=2)
    early_by_step = [
        may_query_early(MethodConfig(kd_coef=annealed), step, History()) for step in range(3)
    ]
    assert early_by_step == [True, True, False]


def test_settings_that_a_server_cannot_serve_are_refused() -> None:
    model = ModelConfig(teacher="http://host:1")
    exact = [MethodConfig(kd=kd) for kd in ("rkl", "fkl", "jsd", "rkl+fkl")]
    exact.append(MethodConfig(kd_baseline="kl"))
    head = TeacherConfig(head="folder")
    for method in exact:
        kd = re.escape(rf'kd "{method.kd}"') if method.kd_baseline is None else "kd_baseline kl"
        with pytest.raises(ValueError, match=rf"teacher\.head must be set for method\.{kd} with a"):
            TrainConfig(model=model, method=method)
        TrainConfig(model=model, method=method, teacher=head)
        split = replace(model, tensor_parallel=2)
        with pytest.raises(ValueError, match=r"tensor_parallel must be 1 for .* URL, got 2: each"):
            TrainConfig(model=split, method=method, teacher=head)
    spoken = replace(model, teacher_api="openai")
    for one, kinds in ((model, '"topk_rkl", "k2"'), (spoken, '"k2"')):
        with pytest.raises(ValueError, match=f"set method.kd to {kinds} or"):
            TrainConfig(model=one, method=MethodConfig(kd="rkl"))
    with pytest.raises(ValueError, match=r'model\.teacher_api must be "kdrl" for .*"openai"'):
        TrainConfig(model=spoken, method=MethodConfig(kd="topk_rkl"), teacher=head)
    cool = SamplingConfig(temperature=0.7)
    for method in exact:
        TrainConfig(model=spoken, method=method, teacher=head, sampling=cool)  # states have none
    assert TrainConfig(model=model, sampling=cool).model.teacher_is_url
    openai = ModelConfig(teacher="https://host/v1", teacher_api="openai")
    with pytest.raises(ValueError, match=r'must be 1 with model\.teacher_api "openai", got 0\.7'):
        TrainConfig(model=openai, sampling=cool)
    TrainConfig(model=ModelConfig(teacher="folder"), method=MethodConfig(kd="rkl"), sampling=cool)
