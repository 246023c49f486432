"""Reads the window of a model: how many tokens a sequence may have, prompt and completion."""

from typing import Any


def window(config: Any) -> int | None:
    """Return the window of the model with this config of transformers; None if it names none.

    max_position_embeddings is the window, except where it stays the length of pretraining by
    transformers' convention, and the rotary embeddings extend it by their `factor`:

    - `yarn`: factor times original_max_position_embeddings, which is max_position_embeddings where
      it is not set. Some models (DeepSeek) write the product into max_position_embeddings, too.
    - `linear`, `dynamic`: factor times original_max_position_embeddings, else times
      max_position_embeddings.
    - `longrope`, `llama3`, and models that scale in some layers alone (Gemma 3):
      max_position_embeddings is the extended length.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if positions is None or rope.get("rope_type") not in ("yarn", "linear", "dynamic"):
        return positions
    factor = rope.get("factor")
    if factor is None:  # DeepSeek: the rotary code takes their ratio
        return positions
    return int(factor * (rope.get("original_max_position_embeddings") or positions))
