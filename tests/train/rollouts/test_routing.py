"""Which teacher a problem names, by a column of its record."""

from dataclasses import replace
from typing import Any

import pytest

from kdrl_train.batch import Example
from kdrl_train.config import DataConfig, ModelConfig, TrainConfig
from kdrl_train.rollouts.problems import encode_all, example_of
from kdrl_train.rollouts.routing import check_routing, teacher_of


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"info": {"domain": "math"}}, "math"),
        ({"info": {"domain": " math\n"}}, "math"),
        ({"info": {"domain": 3}}, "3"),
        ({"info.domain": "code", "info": {"domain": "math"}}, "code"),
        ({"info": {"domain": None}}, ""),
        ({"info": {"domain": "  "}}, ""),
        ({"info": {}}, ""),
        ({}, ""),
    ],
)
def test_the_name_in_a_record(record: dict[str, Any], name: str) -> None:
    assert teacher_of("x.jsonl:1", record, "info.domain") == name
    assert teacher_of("x.jsonl:1", record, None) == ""


@pytest.mark.parametrize("value", [True, 1.5, ["math"], {"a": 1}])
def test_what_is_no_name_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(ValueError, match=r"'domain' of x\.jsonl:7 must hold the name of a teacher"):
        teacher_of("x.jsonl:7", {"domain": value}, "domain")


def test_another_teacher_makes_another_data_set(tokenizer: Any) -> None:
    config = DataConfig(teacher_column="domain")
    record = {"question": "1+1=", "answer": "2", "domain": "math"}
    one = example_of("x.jsonl:1", record, config)
    assert one.teacher == "math"
    others = [one, replace(one, teacher="code"), replace(one, teacher="")]
    assert len({encode_all(tokenizer, [e], config).sha256 for e in others}) == 3
    chat = {"question": [{"role": "user", "content": "1+1="}], "answer": "2", "domain": "math"}
    assert example_of("x.jsonl:2", chat, config).teacher == "math"


def test_teachers_without_a_problem_are_doubtful() -> None:
    config = TrainConfig(
        model=ModelConfig(teacher="A", teachers={"math": "B"}),
        data=DataConfig(teacher_column="domain"),
    )
    examples = [Example("1", "p", "a"), Example("2", "p", "a", teacher="math")]
    assert check_routing(examples, config) == "default 1, math 1 problems"
    for kept, key in ((examples[:1], r"model\.teachers\.math"), (examples[1:], r"model\.teacher ")):
        with pytest.raises(UserWarning, match=rf"^{key}.*should teach some problem, got default"):
            check_routing(kept, config)
