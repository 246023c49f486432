"""Reads problems with their gold answers, orders them by step, and encodes them as prompts."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from kdrl_train.batch import Example
from kdrl_train.config import DataConfig
from kdrl_train.rollouts.answers.boxes import box_spans
from kdrl_train.rollouts.columns import column_value, messages_of, text_of
from kdrl_train.rollouts.records import data_records
from kdrl_train.rollouts.rendering import PromptError, TooLongError, encode_text, templated
from kdrl_train.rollouts.routing import teacher_of

MOST_LEFT_OUT = 0.5
"""Largest share of the problems that may be left out because their prompts are too long."""


def load_examples(config: DataConfig) -> list[Example]:
    """Read every record of a data set, in the order of data_records.

    Args:
        config: `path` is what data_records reads.
    Returns: at least one Example. A numeric gold answer becomes text, 27.0 as "27".
    Raises: FileNotFoundError for a path that does not exist; ValueError for a missing column, a
        record that is not usable or an empty set, each naming the file, the record and the setting.
    """
    if "{prompt}" not in config.prompt_template:
        raise ValueError(
            "data.prompt_template must contain {prompt}, where the problem goes, "
            f"got {config.prompt_template!r}"
        )
    examples = [example_of(place, record, config) for place, record in data_records(config)]
    if not examples:
        raise ValueError(
            f"data.path must hold at least one record, got 0 in {config.path!r}: check the file, "
            f"or data.split (now {config.split!r})"
        )
    return examples


def gold_answer(text: str) -> str:
    """Return the gold answer of a worked solution: what follows its last `####` (GSM8K), or what
    its only `\\boxed{}` holds (MATH); else the text, stripped."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    spans = list(box_spans(text))
    return text[slice(*spans[0])].strip() if len(spans) == 1 else text.strip()


def step_indices(n_examples: int, seed: int, step: int, prompts_per_step: int) -> list[int]:
    """Return the examples of one step: P indices into [0, n_examples).

    They are a pure function of the arguments. The steps go through one endless sequence of epochs.
    Each epoch is a new permutation, drawn from (seed, epoch), and holds every example once. A step
    that crosses the end of an epoch may hold an example twice.

    Raises: ValueError where n_examples or prompts_per_step is below 1, or step below 0.
    """
    for name, value, least in (
        ("n_examples", n_examples, 1),
        ("prompts_per_step", prompts_per_step, 1),
        ("step", step, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    first = step * prompts_per_step
    places = (divmod(place, n_examples) for place in range(first, first + prompts_per_step))
    return [_permutation(n_examples, seed, epoch)[offset] for epoch, offset in places]


def encode_prompt(tokenizer: Any, example: Example, config: DataConfig) -> list[int]:
    """Encode a problem as the token ids of a prompt that a model continues.

    With data.chat_template and a tokenizer that has a template, the prompt is the system message if
    data.system_prompt is set, the user message, and the header of the assistant's turn. Otherwise
    it is the special tokens that the tokenizer puts before a text (BOS), and the text.

    Args:
        tokenizer: a tokenizer of transformers.
    Raises: TooLongError for more than data.max_prompt_tokens, no prompt is cut; PromptError for one
        without tokens, a chat template that fails, and a system prompt without a chat template.
    """
    try:
        ids = encode_text(tokenizer, example.content, config)
    except PromptError as error:
        raise PromptError(f"prompt {example.id}: {error}") from error
    if not ids:
        raise PromptError(
            f"prompt {example.id} must have at least one token, got 0 of {example.prompt!r}: check "
            "the tokenizer and data.prompt_template"
        )
    if len(ids) > config.max_prompt_tokens:
        raise TooLongError(
            f"prompt {example.id} must have at most data.max_prompt_tokens = "
            f"{config.max_prompt_tokens} tokens, got {len(ids)}: raise data.max_prompt_tokens or "
            "remove the record"
        )
    return ids


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompts:
    """What is known of the policy's or the teacher's prompts once each was encoded."""

    count: int
    """How many are short enough."""
    longest: int
    """Tokens of the longest of these."""
    too_long: list[int]
    """Places of the problems with a prompt that is not."""
    first_too_long: str | None
    """The name of the first of them."""
    sha256: str
    """Hash of those that are short enough, in their order."""

    WHY_LEFT_OUT: ClassVar[str]
    """What is wrong with the problems that are left out, in tokens."""

    def kept(self, examples: list[Example]) -> list[Example]:
        """Leave out of the data set's problems those that are too long."""
        places = set(self.too_long)
        return [example for i, example in enumerate(examples) if i not in places]

    @property
    def left_out(self) -> str | None:
        """Say how many problems are left out; None: none are."""
        if not self.too_long:
            return None
        return (
            f"{len(self.too_long):,} of {self.count + len(self.too_long):,} problems are left out: "
            f"{self.WHY_LEFT_OUT} tokens; the first is {self.first_too_long}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherPromptFacts(EncodedPrompts):
    """What is known of the teacher's prompts of a data set; the hash is that of their texts."""

    WHY_LEFT_OUT: ClassVar = "their teacher's prompts have more than max_teacher_prompt_tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptFacts(EncodedPrompts):
    """What is known of the policy's prompts; the hash is of problems, golds and chat template."""

    shortest: int
    """Tokens of the shortest prompt."""
    last: Counter[int]
    """Token id -> how many prompts end with it."""
    started_twice: int
    """How many prompts hold the start of sequence more than once."""
    teacher: TeacherPromptFacts | None = None
    """What is known of the teacher's prompts; None: it reads the policy's."""

    WHY_LEFT_OUT: ClassVar = "their prompts have more than max_prompt_tokens"

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint saves, so that a run goes on with the problems that it began with."""
        hashes = self.sha256
        if self.teacher is not None:
            hashes = hashlib.sha256(f"{hashes} {self.teacher.sha256}".encode()).hexdigest()
        return {"count": self.count, "sha256": hashes}


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """Holds the problems of one section of the settings, without those that are too long."""

    section: str
    """As "eval.data"."""
    data: DataConfig
    examples: list[Example]
    facts: PromptFacts


def encode_all(tokenizer: Any, examples: list[Example], config: DataConfig) -> PromptFacts:
    """Encode every problem once, to see which prompts are too long.

    Raises: PromptError as encode_prompt, and where more than MOST_LEFT_OUT of them are too long.
    """
    lengths, too_long, last, started_twice = [], [], Counter[int](), 0
    # not the ids of the prompts: some templates write the day's date
    template = tokenizer.chat_template if templated(tokenizer, config) else None
    if template is not None and config.template_arguments:
        template = [template, config.template_arguments]
    sha256 = hashlib.sha256(json.dumps(template).encode())
    for place, example in enumerate(examples):
        try:
            ids = encode_prompt(tokenizer, example, config)
        except TooLongError:
            too_long.append(place)
            continue
        lengths.append(len(ids))
        named = [example.teacher] if example.teacher else []
        sha256.update(json.dumps([example.content, example.gold, *named]).encode())
        last[ids[-1]] += 1
        started_twice += ids.count(tokenizer.bos_token_id) > 1
    first = examples[too_long[0]].id if too_long else None
    if len(too_long) > MOST_LEFT_OUT * len(examples):
        raise PromptError(
            f"data.max_prompt_tokens must leave at least {1 - MOST_LEFT_OUT:.0%} of the problems, "
            f"got {config.max_prompt_tokens}, and {len(too_long):,} of {len(examples):,} with "
            f"longer prompts, {first} first: raise it, or correct data.prompt_template or "
            "data.prompt_column"
        )
    return PromptFacts(
        count=len(lengths),
        shortest=min(lengths),
        longest=max(lengths),
        too_long=too_long,
        first_too_long=first,
        last=last,
        started_twice=started_twice,
        sha256=sha256.hexdigest(),
    )


@lru_cache(maxsize=2)  # a step touches one epoch, or two where it crosses an end
def _permutation(n_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(n_examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # hashed by SHA-512: neighbours are unrelated
    return tuple(order)


def example_of(place: str, record: dict[str, Any], config: DataConfig) -> Example:
    """Make the Example of a record. Raises: ValueError for a record that is not usable."""
    key, column = "data.answer_column", config.answer_column
    gold = gold_answer(text_of(place, record, key, column))
    if not gold:
        raise ValueError(
            f"{key} {column!r} of {place} must hold a gold answer, got "
            f"{column_value(record, column)!r}: correct or remove the record"
        )
    teacher = teacher_of(place, record, config.teacher_column)
    messages = messages_of(place, record, "data.prompt_column", config.prompt_column)
    if messages is None:
        problem = text_of(place, record, "data.prompt_column", config.prompt_column)
        prompt = inside_template(problem, config)
        return Example(place, prompt, gold, teacher=teacher, columns=record)
    if config.system_prompt is not None and any(one["role"] == "system" for one in messages):
        raise ValueError(
            "data.system_prompt must be None where messages have their own system message, got "
            f"{config.system_prompt!r} and that of {place}: unset it, or take the message out"
        )
    *before, last = messages
    messages = [*before, last | {"content": inside_template(last["content"], config)}]
    return Example(
        place, as_text(messages), gold, teacher=teacher, columns=record, messages=tuple(messages)
    )


def as_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Write chat messages as one text, for people and rewards."""
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages)


def inside_template(problem: str, config: DataConfig) -> str:
    """Put data.prompt_template around the text of a problem."""
    return config.prompt_template.replace("{prompt}", problem)
