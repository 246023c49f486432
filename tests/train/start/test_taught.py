"""A policy of `sft` says how its prompts were written."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from kdrl_train.config import DataConfig
from kdrl_train.start.taught import taught_otherwise

CHAT = SimpleNamespace(chat_template="a template")
PLAIN = SimpleNamespace(chat_template=None)


@pytest.mark.parametrize(
    ("learnt", "expected"),
    [
        ('data: {prompt_template: "{prompt}\\n"}', "data.prompt_template '{prompt}\\n'"),
        ("data: {chat_template: false}", "data.chat_template False"),
        ("data: {system_prompt: Hello}", "data.system_prompt 'Hello'"),
        ("data: {template_arguments: {a: 1}}", "data.template_arguments {'a': 1}"),
        ("data: {no_setting: 1}", None),
        ('data: {path: other.jsonl, prompt_template: "{prompt}"}', None),
        ("data: 3", None),
        ("- 3", None),
    ],
)
def test_other_prompts_than_those_of_sft_are_named(
    tmp_path: Path, learnt: str, expected: str | None
) -> None:
    (tmp_path / "sft.yaml").write_text(learnt)
    lines = taught_otherwise(str(tmp_path), CHAT, DataConfig(prompt_template="{prompt}"))
    if expected is None:
        assert lines == []
    else:
        assert lines == [
            f"the policy learnt to read prompts with {expected}, as {tmp_path / 'sft.yaml'} says"
        ]


def test_a_policy_of_another_program_says_nothing(tmp_path: Path) -> None:
    assert taught_otherwise(str(tmp_path), CHAT, DataConfig()) == []
    assert taught_otherwise("a-hub/id", CHAT, DataConfig()) == []


def test_without_a_chat_template_its_settings_are_not_read(tmp_path: Path) -> None:
    data = DataConfig(prompt_template="{prompt}")
    (tmp_path / "sft.yaml").write_text('data: {chat_template: false, prompt_template: "{prompt}"}')
    assert taught_otherwise(str(tmp_path), PLAIN, data) == []
    (tmp_path / "sft.yaml").write_text('data: {prompt_template: "Q {prompt}"}')
    assert len(taught_otherwise(str(tmp_path), PLAIN, data)) == 1
