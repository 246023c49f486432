"""The tokens that end a sequence."""

from typing import Any


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a sequence: of the generation config, the config and the tokenizer.

    Raises: ValueError when none of the three names one.
    """
    found: set[int] = set()
    config = model.config.get_text_config()
    for owner in (model.generation_config, config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    if not found:
        raise ValueError(
            "eos_token_id must be set in the model's generation_config.json or in its tokenizer, "
            "got none: completions could never end"
        )
    return sorted(found)
