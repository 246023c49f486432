"""Chat messages as problems: read from a column, inside the template, and refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from kdrl_train.config import DataConfig
from kdrl_train.rollouts.problems import encode_all, encode_prompt, load_examples
from kdrl_train.rollouts.rendering import PromptError
from tests.train.rollouts.test_problems import TEMPLATE, make_tokenizer, write_jsonl


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "is 1"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "what"},
]


def test_a_parquet_file_as_verl_writes_it_needs_three_options(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Messages, and the gold answer in a nested column beside a struct that they have not all."""
    path = tmp_path / "train.parquet"
    record = {
        "data_source": "made up",
        "prompt": MESSAGES,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "1"},
        "extra_info": {"index": 0, "split": "train"},
    }
    short = record | {"prompt": MESSAGES[1:2], "extra_info": {"index": 1, "answer": "#### 1"}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record, short]), path)
    config = DataConfig(
        path=str(path), prompt_column="prompt", answer_column="reward_model.ground_truth"
    )
    first, second = load_examples(config)
    assert (first.messages, first.gold) == (tuple(MESSAGES), "1")
    assert first.columns["extra_info"]["index"] == 0
    assert second.prompt == "user: is 1"
    tokenizer.chat_template = TEMPLATE
    assert encode_prompt(tokenizer, first, config) == [8, 5, 6, 7, 3, 4, 9, 4, 7, 2, 9]
    assert encode_prompt(tokenizer, second, config) == [7, 3, 4, 9]
    with pytest.raises(PromptError, match="must hold texts where no chat template is applied"):
        encode_all(tokenizer, [first], replace(config, chat_template=False))


def test_the_template_is_around_the_last_message(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Also where a text spells the messages."""
    records = [{"question": q, "answer": 1} for q in (MESSAGES[1:], json.dumps(MESSAGES[1:]))]
    path = write_jsonl(tmp_path / "set.jsonl", records)
    config = DataConfig(path=str(path), prompt_template="{prompt} be", system_prompt="brief")
    example, spelled = load_examples(config)
    assert replace(spelled, id=example.id) == example
    assert example.messages == (*MESSAGES[1:3], {"role": "user", "content": "what be"})
    tokenizer.chat_template = TEMPLATE
    assert encode_prompt(tokenizer, example, config) == [8, 6, 7, 3, 4, 9, 4, 7, 2, 5, 9]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (MESSAGES, r"data\.system_prompt must be None where messages have .* 'brief' and .*:1"),
        (MESSAGES[1:3], r"set\.jsonl:1 must end with a message of the user, got \{'role': 'assist"),
        ([], "must end with a message of the user, got no message"),
        (json.dumps(MESSAGES[1:3]), r"must end with a message of the user, got \{'role': 'assist"),
        (str(MESSAGES), "must hold text or messages in JSON, got a text that begins as messages"),
        ([{"role": "user", "content": " "}], "must end with a message of the user"),
        ([{"role": "user", "content": [{"type": "image"}]}], "role and content as text, got"),
        ([{"role": "user"}], "each with role and content as text"),
        ([{"role": "user", "content": "\ud800"}], "must be valid Unicode"),
    ],
)
def test_messages_that_no_completion_can_follow_are_named(
    tmp_path: Path, messages: Any, message: str
) -> None:
    path = write_jsonl(tmp_path / "set.jsonl", [{"question": messages, "answer": "1"}])
    with pytest.raises(ValueError, match=message):
        load_examples(DataConfig(path=str(path), system_prompt="brief"))
