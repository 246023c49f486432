"""The estimate of memory: teachers beside the policy, beside each other, and elsewhere."""

from dataclasses import replace

import pytest

from kdrl_train.config import (
    DataConfig,
)
from kdrl_train.method.config import MethodConfig
from kdrl_train.start.estimate.case import Placement
from kdrl_train.start.estimate.memory import memory_terms
from tests.train.estimate_cases import (
    sharded_case,
    values,
)


def test_a_reference_stands_beside_the_teacher(models: dict[str, str]) -> None:
    """bfloat16, 20 tokens a pack, H 12 and 8; a head of as many rows as the smaller one has."""
    case = sharded_case(models)
    model = replace(case.run.model, reference="somewhere")
    with_one = replace(case, run=replace(case.run, model=model), other_teachers=(case.policy,))
    plain, held = (
        {term.name: term.value for term in memory_terms(one)} for one in (case, with_one)
    )
    more = {name: value for name, value in held.items() if name not in plain}
    assert more.pop("the other teachers") == 2 * 1480 / 4
    assert more == {
        "states of teacher and reference": 2 * case.pack_tokens * (2 * 8 + 12),
        "heads of teacher and reference": 2 * 32 * (8 + 12),
    }


@pytest.mark.parametrize("largest", [True, False], ids=["a larger one beside", "a smaller one"])
def test_the_policy_itself_teaches_beside_others(models: dict[str, str], largest: bool) -> None:
    """bfloat16, four GPUs: the policy has 1480 parameters, the others 4356 and 1480 or 4356 alone.

    Live weights have no copy, frozen ones one in bfloat16, an average is float32.
    """
    case = sharded_case(models)
    assert case.teacher is not None
    shapes = (case.teacher, case.policy) if largest else (case.policy, replace(case.policy))
    others = 4356 if largest else 1480
    held = {}
    for kind in ("live", "ema", "frozen"):
        model = replace(case.run.model, teacher="self", self_teacher=kind, teachers={"a": "x"})
        data = DataConfig(teacher_column="t", teacher_template="{prompt}{answer}")
        run = replace(case.run, model=model, data=data)
        one = replace(case, run=run, teacher=shapes[0], other_teachers=shapes[1:])
        held[kind] = values(one)
        three = replace(one, other_teachers=(*shapes[1:], case.policy))
        more = 2 * 1480 / 4 + (0 if kind != "frozen" else 2 * 1480 / 4)
        assert values(three)["the other teachers"] == more
    assert held["live"]["teacher"] == held["ema"]["teacher"] == 2 * others / 4
    assert held["frozen"]["teacher"] == 2 * shapes[0].parameters / 4
    assert held["ema"]["average of the policy"] == 4 * 1480 / 4
    assert held["frozen"]["the other teachers"] == 2 * shapes[1].parameters / 4
    for kind in ("live", "ema"):
        assert "the other teachers" not in held[kind]
    assert "average of the policy" not in held["live"]


def test_where_the_teacher_is(models: dict[str, str]) -> None:
    full, away = (values(sharded_case(models, teacher_weights=w)) for w in ("full", "cpu"))
    assert full["teacher"] == 2 * 4356
    assert "teacher's layers, gathered" not in full
    assert "teacher" not in away
    assert away["teacher's layers, gathered"] == 2 * (2 * 1128 + 972)
    alone = sharded_case(models)
    assert values(replace(alone, placement=Placement()))["teacher"] == 2 * 4356
    here = Placement(cpu=True, teacher_weights="cpu")
    assert values(replace(alone, placement=here))["teacher"] == 2 * 4356


def test_a_shaped_reward_is_estimated_as_sampled_distillation(models: dict[str, str]) -> None:
    case = sharded_case(models)
    shaped, sampled = (
        values(replace(case, run=replace(case.run, method=MethodConfig(kd=kd))))
        for kd in ("reward", "k2")
    )
    assert shaped == sampled
