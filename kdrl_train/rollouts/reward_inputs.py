"""Collects what a reward may know of a completion beside its text and the gold answer.

It all goes to the worker processes, so it is plain: text, numbers, lists and dicts.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kdrl_train.batch import Example, Rollouts
from kdrl_train.rollouts.rendering import decoded

MOST_CHARS = 1_000_000
"""Longest record that rewards may get, in characters as Python writes it: each of its completions
sends it to a worker."""


def plain_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a record that hold nothing but text, numbers, True, False, None, and
    lists and dicts of these; an image, say, is left out."""
    return {name: value for name, value in columns.items() if _is_plain(value)}


def _is_plain(value: Any, depth: int = 0) -> bool:
    if type(value) is dict:
        inside = [*value, *value.values()]
    elif type(value) is list:
        inside = value
    else:
        return value is None or type(value) in (str, int, float, bool)
    return depth < 100 and all(_is_plain(one, depth + 1) for one in inside)


def check_columns(examples: Sequence[Example]) -> list[str]:
    """Check that rewards can get the records of all problems.

    Returns: the columns of which some value is left out, since it is not plain.
    Raises: ValueError for a record of more than MOST_CHARS.
    """
    left_out: dict[str, None] = {}
    for example in examples:
        columns = plain_columns(example.columns)
        left_out |= dict.fromkeys(name for name in example.columns if name not in columns)
        if (size := len(repr(columns))) > MOST_CHARS:
            raise ValueError(
                f"a record must have at most {MOST_CHARS:,} characters for a reward that takes "
                f"columns, got {size:,} in {example.id}: take large columns out of the file"
            )
    return list(left_out)


def reward_inputs(
    names: Collection[str], examples: Sequence[Example], rollouts: Rollouts, tokenizer: Any
) -> list[dict[str, Any]]:
    """Collect the inputs of R completions that rewards take, by their names (rewards.INPUTS).

    Args:
        names: Verifier.inputs.
        examples: R, one per completion.
    """
    return [
        _chosen(
            names, example, tokenizer, rollouts.completion_ids[r].tolist(), rollouts.truncated[r]
        )
        for r, example in enumerate(examples)
    ]


def answer_inputs(
    names: Collection[str], examples: Sequence[Example], texts: Sequence[str], tokenizer: Any
) -> list[dict[str, Any]]:
    """Collect the inputs of texts that no policy has written, as reward_inputs does."""
    if "tokens" not in names and "raw_completion" not in names:
        ids: list[list[int]] = [[]] * len(texts)
    else:
        ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [
        _chosen(names, example, tokenizer, tokens, truncated=False)
        for example, tokens in zip(examples, ids, strict=True)
    ]


def _chosen(
    names: Collection[str], example: Example, tokenizer: Any, tokens: list[int], truncated: Any
) -> dict[str, Any]:
    """Make those inputs of one completion that are named."""
    inputs: dict[str, Any] = {}
    if "prompt" in names:
        inputs["prompt"] = example.prompt
    if "columns" in names:
        inputs["columns"] = plain_columns(example.columns)
    if "tokens" in names:
        inputs["tokens"] = tokens
    if "raw_completion" in names:
        inputs["raw_completion"] = decoded(tokenizer, tokens)
    if "truncated" in names:
        inputs["truncated"] = bool(truncated)
    return inputs
