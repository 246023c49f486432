"""Renders what a teacher reads in place of the policy's prompt: data.teacher_template.

It may show the teacher what the policy must not see: the gold answer, a worked solution, a hint.
The completion that follows is the policy's own, so that both give log-probabilities of the same
tokens, each after its own prompt.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdrl_train.batch import Example, Rollouts
from kdrl_train.config import DataConfig, TrainConfig
from kdrl_train.rollouts.columns import messages_of, text_of
from kdrl_train.rollouts.problems import (
    MOST_LEFT_OUT,
    TeacherPromptFacts,
    as_text,
    encode_prompt,
)
from kdrl_train.rollouts.rendering import Content, PromptError, TooLongError, encode_text

KEY = "data.teacher_template"
_NAME = re.compile(r"\{\{([A-Za-z_][\w.-]*)\}\}|\{([A-Za-z_][\w.-]*)\}")
"""A name in two braces, which stays in one, or a name in one, which stands for a value."""


def teacher_content(example: Example, data: DataConfig) -> Content:
    """Write data.teacher_template of a problem; of chat messages it takes the last one's place."""
    text = teacher_text(example, data)
    if not example.messages:
        return text
    *before, last = example.messages
    return [*before, {**last, "content": text}]


def shown_to_teacher(example: Example, data: DataConfig) -> str:
    """Write what the teacher reads of a problem as a text, messages as in Example.prompt."""
    content = teacher_content(example, data)
    return content if isinstance(content, str) else as_text(content)


def teacher_text(example: Example, data: DataConfig) -> str:
    """Write data.teacher_template of a problem: {name} becomes the value of that name.

    {prompt} is the problem (of messages the last one) without data.prompt_template, {answer} the
    gold answer, {solution} the column of that name or, where there is none, the whole text of
    data.answer_column; any other name is a column. Other braces stay as they are.

    Raises: ValueError naming the record for a name that it has no text for.
    """
    assert data.teacher_template is not None

    def value(match: re.Match[str]) -> str:
        kept, name = match.groups()
        return f"{{{kept}}}" if kept else _value(example, name, data)

    return _NAME.sub(value, data.teacher_template)


def _value(example: Example, name: str, data: DataConfig) -> str:
    """Return what a name of the template stands for in one problem."""
    columns: Mapping[str, Any] = example.columns
    if name == "answer":
        return example.gold
    column = name
    if name == "prompt":
        column = data.prompt_column
        if example.messages:
            messages = messages_of(example.id, columns, "data.prompt_column", column)
            return str((messages or [])[-1]["content"])
    elif name == "solution" and name not in columns:
        column = data.answer_column
    return text_of(example.id, columns, f"{{{name}}} in {KEY}", column)


def encode_teacher_prompt(tokenizer: Any, example: Example, data: DataConfig) -> list[int]:
    """Encode what the teacher reads before a completion, as encode_prompt does the prompt.

    Raises: TooLongError for more than data.max_teacher_prompt_tokens; PromptError as encode_prompt.
    """
    try:
        ids = encode_text(tokenizer, teacher_content(example, data), data)
    except PromptError as error:
        raise PromptError(f"the teacher's prompt of {example.id}: {error}") from error
    if not ids:
        raise PromptError(
            f"the teacher's prompt of {example.id} must have at least one token, got 0: check {KEY}"
        )
    if len(ids) > data.max_teacher_prompt_tokens:
        raise TooLongError(
            f"the teacher's prompt of {example.id} must have at most "
            f"data.max_teacher_prompt_tokens = {data.max_teacher_prompt_tokens} tokens, got "
            f"{len(ids)}: raise it, or remove the record"
        )
    return ids


def encode_as_teacher_reads(tokenizer: Any, example: Example, data: DataConfig) -> list[int]:
    """Encode the prompt that a teacher reads: its own, or the policy's without a template."""
    encode = encode_prompt if data.teacher_template is None else encode_teacher_prompt
    return encode(tokenizer, example, data)


def read_by_teachers(config: TrainConfig) -> DataConfig | None:
    """Return how problems are written where teachers read prompts of their own, else None."""
    reads = config.method.kd is not None and config.data.teacher_template is not None
    return config.data if reads else None


def encode_teacher_prompts(
    tokenizer: Any, examples: list[Example], data: DataConfig
) -> TeacherPromptFacts:
    """Encode the teacher's prompt of every problem once, to see which are too long.

    Raises: ValueError as encode_teacher_prompt, and where more than MOST_LEFT_OUT of them are too
        long.
    """
    longest, too_long, sha256 = 0, [], hashlib.sha256()
    for place, example in enumerate(examples):
        try:
            longest = max(longest, len(encode_teacher_prompt(tokenizer, example, data)))
        except TooLongError:
            too_long.append(place)
            continue
        sha256.update(json.dumps(teacher_text(example, data)).encode())
    first = examples[too_long[0]].id if too_long else None
    if len(too_long) > MOST_LEFT_OUT * len(examples):
        raise PromptError(
            f"data.max_teacher_prompt_tokens must leave at least {1 - MOST_LEFT_OUT:.0%} of the "
            f"problems, got {data.max_teacher_prompt_tokens}, and {len(too_long):,} of "
            f"{len(examples):,} with longer prompts of the teacher, {first} first: raise it, or "
            f"shorten {KEY}"
        )
    return TeacherPromptFacts(
        longest=longest,
        too_long=too_long,
        first_too_long=first,
        count=len(examples) - len(too_long),
        sha256=sha256.hexdigest(),
    )


def teacher_prompts(
    tokenizer: Any, examples: Sequence[Example], data: DataConfig
) -> list[Tensor] | None:
    """Encode what the teacher reads before each of R completions, [T_prompt] int64 each; the
    completions of one problem share a tensor.

    examples: R, one per completion. Returns: None without data.teacher_template.
    """
    if data.teacher_template is None:
        return None
    prompts: dict[int, Tensor] = {}
    for example in examples:
        if id(example) not in prompts:
            prompts[id(example)] = torch.tensor(encode_teacher_prompt(tokenizer, example, data))
    return [prompts[id(example)] for example in examples]


def as_teacher_reads(
    tokenizer: Any, examples: Sequence[Example], data: DataConfig, rollouts: Rollouts
) -> Rollouts:
    """Put the teacher's prompts before the completions, for a server that scores them.

    examples: R, one per completion.
    """
    prompts = teacher_prompts(tokenizer, examples, data)
    return rollouts if prompts is None else replace(rollouts, prompt_ids=prompts)
