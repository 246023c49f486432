"""Finds the tokens that end a sequence."""

from typing import Any


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return, sorted, every token that ends a sequence.

    They are those of the model's generation config, of its config and of the tokenizer together.

    Raises: ValueError when none of the three names one.
    """
    ends: set[int] = set()
    config = model.config.get_text_config()
    for source in (model.generation_config, config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        ends.update([ids] if isinstance(ids, int) else ids or [])
    if not ends:
        raise ValueError(
            "eos_token_id must be set in the model's generation_config.json or in its tokenizer, "
            "got none: completions could never end"
        )
    return sorted(ends)
