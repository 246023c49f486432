"""Problems and gold answers: reading them, ordering them, turning them into prompt tokens."""

import importlib
import json
import math
import random
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from kdrl_train.batch import Example
from kdrl_train.config import DataConfig

SUFFIXES = (".jsonl", ".parquet")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?")


def load_examples(config: DataConfig) -> list[Example]:
    """Every row of a data set, in file order; nothing is skipped but blank lines of a .jsonl.

    Args:
        config: `path` is a .jsonl or .parquet file, a folder of them (those whose name starts with
            the split; all of them where no name starts with a split's name), or a hub id, which
            may name a configuration after a colon ("openai/gsm8k:main") and is read by `datasets`.
    Returns: at least one Example. A numeric answer becomes text, 27.0 as "27".
    Raises: FileNotFoundError for a path that is not there; ValueError for a missing column, a row
        that is not usable or an empty set, each naming the file, the row and the config key.
    """
    if "{prompt}" not in config.prompt_template:
        raise ValueError(
            "data.prompt_template must contain {prompt}, where the problem goes, "
            f"got {config.prompt_template!r}"
        )
    examples = [_example(place, row, config) for place, row in _rows(config)]
    if not examples:
        raise ValueError(
            f"data.path must hold at least one row, got 0 in {config.path!r}: check the file, or "
            f"data.split (now {config.split!r})"
        )
    return examples


def gold_answer(text: str) -> str:
    """What follows the last `####` of a worked solution (GSM8K), else the text itself, stripped."""
    return text.rpartition("####")[2].strip()


def step_indices(n_examples: int, seed: int, step: int, prompts_per_step: int) -> list[int]:
    """The examples of one step: P indices into [0, n_examples), a pure function of its arguments.

    Steps walk through one endless sequence of epochs, each a fresh permutation drawn from
    (seed, epoch): every example once per epoch, nothing dropped at its end, nothing to save.
    A step that crosses the end of an epoch may hold an example twice.

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
    """Token ids of a prompt, ready to be continued.

    With data.chat_template and a tokenizer that has one: system and user message and the header of
    the assistant's turn. Otherwise the text with the tokenizer's own special tokens (BOS).

    Args:
        tokenizer: of transformers.
    Raises: ValueError for a prompt of no tokens, or of more than data.max_prompt_tokens (it names
        the example and both numbers; nothing is cut), and for a system prompt that has no template.
    """
    if config.chat_template and tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": example.prompt}]
        if config.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": config.system_prompt})
        # return_dict: transformers 5 returns a dictionary by default, 4 did not
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    elif config.system_prompt is not None:
        raise ValueError(
            "data.system_prompt must be None where no chat template is applied, got "
            f"{config.system_prompt!r}: write it into data.prompt_template, or use a tokenizer "
            "with a chat template and data.chat_template=True"
        )
    else:
        ids = tokenizer(example.prompt)["input_ids"]
    if not ids:
        raise ValueError(
            f"prompt {example.id} must have at least one token, got 0 of {example.prompt!r}: check "
            "the tokenizer and data.prompt_template"
        )
    if len(ids) > config.max_prompt_tokens:
        raise ValueError(
            f"prompt {example.id} must have at most data.max_prompt_tokens = "
            f"{config.max_prompt_tokens} tokens, got {len(ids)}: raise data.max_prompt_tokens or "
            "remove the row"
        )
    return list(ids)


@lru_cache(maxsize=2)  # a step touches one epoch, or two where it crosses an end
def _permutation(n_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(n_examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # hashed by SHA-512: neighbours are unrelated
    return tuple(order)


def _rows(config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it was read, row) of the whole data set."""
    path = Path(config.path)
    if config.path and path.is_file():
        yield from _file_rows(path)
    elif config.path and path.is_dir():
        for file in _split_files(path, config.split):
            yield from _file_rows(file)
    elif _HUB_ID.fullmatch(config.path) and path.suffix not in SUFFIXES:
        yield from _hub_rows(config)
    else:
        raise FileNotFoundError(
            "data.path must be an existing .jsonl or .parquet file, a folder of them, or a hub id, "
            f"got {config.path!r} (looked in {Path.cwd()}): correct data.path"
        )


def _split_files(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    chosen = [file for file in files if file.name.startswith(split)]
    if not chosen and not any(file.name.startswith(_SPLIT_NAMES) for file in files):
        chosen = files
    if not chosen:
        found = ", ".join(file.name for file in files) or "no .jsonl or .parquet file"
        raise FileNotFoundError(
            f"data.split must start the name of a file in {folder}, got {split!r} with {found}: "
            "set data.split, or name the file in data.path"
        )
    return chosen


def _file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
    elif path.suffix == ".parquet":
        rows: Iterable[dict[str, Any]] = (
            importlib.import_module("pyarrow.parquet").read_table(path).to_pylist()
        )
        for number, row in enumerate(rows, start=1):
            yield f"{path.name}:{number}", row
    else:
        raise ValueError(
            f"data.path must end in .jsonl or .parquet, got {str(path)!r}: convert the file"
        )


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(
                    f"{place} in {path.parent} must be one JSON object in UTF-8, got {error}: "
                    "correct the line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{place} in {path.parent} must be a JSON object, got {row!r}")
            yield place, row


def _hub_rows(config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    datasets = importlib.import_module("datasets")
    name, _, configuration = config.path.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=config.split)
    except (OSError, ValueError) as error:  # unknown id, no network, unknown split or configuration
        raise ValueError(
            f"data.path must be an existing file or folder, or a hub id that has data.split = "
            f"{config.split!r}, got {config.path!r}: {error}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{config.path}:{number}", row


def _example(place: str, row: dict[str, Any], config: DataConfig) -> Example:
    problem = _text(place, row, "data.prompt_column", config.prompt_column)
    answer = gold_answer(_text(place, row, "data.answer_column", config.answer_column))
    if not answer:
        raise ValueError(
            f"data.answer_column {config.answer_column!r} of {place} must hold an answer, got "
            f"{row[config.answer_column]!r}: correct or remove the row"
        )
    return Example(place, config.prompt_template.replace("{prompt}", problem), answer)


def _text(place: str, row: dict[str, Any], key: str, column: str) -> str:
    """The column's value as text: numbers spelled out, 27.0 as "27"; nothing else is converted."""
    if column not in row:
        raise ValueError(
            f"{key} must be a column of {place}, which has {sorted(row)}, got {column!r}: set {key}"
        )
    value = row[column]
    if isinstance(value, float) and math.isfinite(value):
        value = str(int(value)) if value.is_integer() else repr(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{key} {column!r} of {place} must hold text or a number, got {value!r}: correct or "
            "remove the row, or name another column"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" in JSON; tokenizers fail on it without a place
        raise ValueError(
            f"{key} {column!r} of {place} must be valid Unicode, got {error}: correct the row"
        ) from error
    return value
