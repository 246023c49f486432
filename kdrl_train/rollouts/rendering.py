"""Renders problems as the token ids that a model continues, and completions as text."""

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jinja2

from kdrl_train.config import DataConfig

TEMPLATE_S = 10.0
"""Longest time of a chat template for one prompt, in seconds; a sane one takes a millisecond."""


class PromptError(ValueError):
    """A problem cannot be made a prompt with these settings and this tokenizer."""


class TooLongError(PromptError):
    """A prompt has more than data.max_prompt_tokens tokens."""


def templated(tokenizer: Any, config: DataConfig) -> bool:
    """Say whether prompts are written in the tokenizer's chat template."""
    return config.chat_template and getattr(tokenizer, "chat_template", None) is not None


Content = str | Sequence[Mapping[str, Any]]
"""A problem as it is rendered: a text, or chat messages."""


def encode_text(tokenizer: Any, content: Content, config: DataConfig) -> list[int]:
    """Encode a problem, in the chat template where one is applied.

    The ids begin with at most one start of sequence, also where both the text and the tokenizer
    write one, and no token that the tokenizer puts behind a text, such as an end of sequence,
    follows: a model continues the prompt.

    Raises: PromptError for messages, a system prompt or arguments without a chat template, and for
        a template that fails.
    """
    if templated(tokenizer, config):
        ids = _apply(tokenizer, content, config, return_dict=False)
    elif not isinstance(content, str):
        raise PromptError(
            "data.prompt_column must hold texts where no chat template is applied, got messages: "
            "use a tokenizer with a chat template and data.chat_template=True"
        )
    elif config.template_arguments:
        raise PromptError(
            "data.template_arguments must be empty where no chat template is applied, got "
            f"{config.template_arguments}: use a tokenizer with a chat template"
        )
    elif config.system_prompt is not None:
        raise PromptError(
            "data.system_prompt must be None where no chat template is applied, got "
            f"{config.system_prompt!r}: write it into data.prompt_template, or use a tokenizer "
            "with a chat template and data.chat_template=True"
        )
    else:
        before, ids, _ = plain_parts(tokenizer, content)
        if ids[: len(before)] != before:  # else the text has them already
            ids = before + ids
    start = getattr(tokenizer, "bos_token_id", None)
    while start is not None and ids[:2] == [start, start]:
        ids = ids[1:]
    return list(ids)


def plain_parts(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """Split a tokenizer's encoding of a text: what it puts before the text, the text's own ids, and
    what it puts behind."""
    whole = list(tokenizer(text)["input_ids"])
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(ids) + 1):
        if whole[start : start + len(ids)] == ids:
            return whole[:start], ids, whole[start + len(ids) :]
    raise PromptError(
        "the policy's tokenizer must only put special tokens before and behind a text, got "
        f"{whole} for {text!r} and {ids} without special tokens: correct its post-processor"
    )


def chat_text(tokenizer: Any, content: Content, config: DataConfig) -> str:
    """Write a problem in the chat template. Raises: PromptError where it fails."""
    return _apply(tokenizer, content, config, tokenize=False)


def _apply(tokenizer: Any, content: Content, config: DataConfig, **options: Any) -> Any:
    """Apply the chat template to data.system_prompt, if it is set, and to the problem's messages,
    or to its text as a message of the user."""
    messages = [dict(one) for one in messages_from(content)]
    options |= config.template_arguments
    if config.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    templates = tokenizer.chat_template or ""
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if _has_power(template):
            raise PromptError(
                "the chat template must not compute powers, got **, which no alarm can stop: "
                "correct chat_template of the tokenizer, or set data.chat_template to false"
            )
    try:
        # return_dict: transformers 5 returns a dictionary by default, 4 did not
        with _deadline(TEMPLATE_S):
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    except _TooSlowError:
        raise PromptError(
            f"the chat template must render a prompt within {TEMPLATE_S:g} s, got none by then: "
            "correct chat_template of the tokenizer, or set data.chat_template to false"
        ) from None
    except Exception as error:  # a template is a program: it can raise whatever its author wrote
        cause = f"{type(error).__name__}: {error}"
    if not isinstance(content, str):
        raise PromptError(
            f"the chat template must render the problem's messages, got {cause}: correct them, or "
            "chat_template of the tokenizer"
        )
    try:
        tokenizer.apply_chat_template(messages[-1:], add_generation_prompt=True, **options)
    except Exception:  # the same
        raise PromptError(
            f"the chat template must render a user's message, got {cause}: correct chat_template "
            "of the tokenizer, or set data.chat_template to false"
        ) from None
    raise PromptError(
        f"the chat template must take a system message, got {cause}: write the text of "
        "data.system_prompt into data.prompt_template, and unset data.system_prompt"
    )


def messages_from(content: Content) -> Sequence[Mapping[str, Any]]:
    """Return a problem's messages; those of a text are one of the user."""
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


@lru_cache(maxsize=4)
def _has_power(template: str) -> bool:
    """Say whether a template holds the operator **: 9 ** 9 ** 9 runs for hours in one piece."""
    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateSyntaxError:  # which rendering names
        return False
    return any(kind == "operator" and value == "**" for _, kind, value in tokens)


class _TooSlowError(Exception):
    """Ends a chat template, which is a program of the model's authors and may loop for ever."""


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise _TooSlowError in the block after some seconds.

    Only the main thread of POSIX has an alarm. There every prompt is rendered once before step 0.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise _TooSlowError

    handler = signal.signal(signal.SIGALRM, ring)
    before = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


def visible_ids(tokenizer: Any, ids: Sequence[int], truncated: bool) -> list[int | None]:
    """Put None for the tokens of a completion that are no text: padding, and the special token that
    ends the sequence, the last one unless the completion was truncated."""
    visible = [None if i == tokenizer.pad_token_id else i for i in ids]
    if not truncated and is_special(tokenizer, ids[-1]):  # else an end such as "</answer>"
        visible[-1] = None
    return visible


def is_special(tokenizer: Any, token: int) -> bool:
    """Say whether a token is one of those that skip_special_tokens skips."""
    added = tokenizer.added_tokens_decoder.get(token)
    return token in tokenizer.all_special_ids or (added is not None and added.special)


def completion_text(tokenizer: Any, ids: Sequence[int], truncated: bool) -> str:
    """Decode a completion with all its special tokens but padding and the end of sequence.

    A reward can then see tokens such as <answer>, also where they were added as special tokens.
    """
    return decoded(tokenizer, [i for i in visible_ids(tokenizer, ids, truncated) if i is not None])


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode tokens to the text that they stand for: many a tokenizer_config.json asks for a
    clean-up that takes out the space before a full stop, a comma or an exclamation mark."""
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text
