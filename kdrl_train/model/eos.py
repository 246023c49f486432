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


def ordinary_ends(tokenizer: Any, ends: list[int]) -> list[str]:
    """Name, in a sentence, the tokens that end a sequence and are plain text to the tokenizer.

    transformers' default for a config.json without eos_token_id is a token of another vocabulary.
    """
    special = {tokenizer.eos_token_id, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = [i for i in ends if i not in special and i < len(tokenizer)]
    if not ordinary:
        return []
    return [
        f"completions end at {ordinary} ({tokenizer.convert_ids_to_tokens(ordinary)}) too, which "
        "are plain text to the tokenizer: if that is not meant, set eos_token_id in the policy's "
        "config.json and generation_config.json"
    ]


def turn_end(tokenizer: Any) -> str | int | None:
    """Return the special token with which the chat template ends an assistant's turn, or its text
    where that holds none.

    Returns: None where nothing but white space ends it, or no assistant's turn is rendered.
    """
    answer = "an answer"
    messages = [{"role": "user", "content": "0"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template is a program that can raise anything; not all take an answer
        return None
    before, _, tail = text.rpartition(answer)
    tail = tail if before else ""
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((i for i in ids if i in special), tail.strip() or None)
