"""Preflight of a teacher behind a URL: does its model fit the policy, does it answer."""

import math
from typing import Any

from kdrl_train.batch import Example
from kdrl_train.config import TrainConfig
from kdrl_train.model.teacher.client import (
    NoAnswerError,
    OpenAiClient,
    Query,
    TeacherClient,
    TeacherError,
    vocabulary_hash,
)
from kdrl_train.rollouts.problems import encode_prompt

PROBE_TOKENS = 256
"""Tokens, spread over the vocabulary, whose texts are compared where no hash of it is known."""


def check_server(client: TeacherClient) -> str:
    """What the server says of itself; that it answers was seen when the run was loaded."""
    info = client.info
    parts = [f"{client.url}: {info.model}", info.dtype]
    parts.append(None if info.vocab_size is None else f"{info.vocab_size:,} columns")
    parts.append(None if info.window is None else f"a window of {info.window:,} tokens")
    return ", ".join(part for part in parts if part)


def check_same_tokens(client: TeacherClient, tokenizer: Any) -> str:
    """The server's tokens are the policy's: by the hash of the map or, where the server has none,
    by the texts of some.

    Raises: ValueError where they differ; TeacherError for a server without prompt log-probs.
    """
    size = len(tokenizer.get_vocab())
    if not isinstance(client, OpenAiClient):
        if client.info.tokenizer != vocabulary_hash(tokenizer):
            raise ValueError(
                f"the teacher at {client.url} must have the policy's tokenizer, got another map of "
                f"tokens to ids: serve a model of the policy's family; `check` with model.teacher "
                f"set to the folder of {client.info.model} names the first token that differs"
            )
        return f"the same {size:,} tokens"
    ids = sorted(set(tokenizer.get_vocab().values()))
    count = min(PROBE_TOKENS, (client.info.window or PROBE_TOKENS) - 1, len(ids))
    chosen = [ids[i * (len(ids) - 1) // max(count - 1, 1)] for i in range(count)]
    query = Query("a probe of the vocabulary", ids[:1], chosen)
    compared = 0
    for token, theirs in zip(chosen, _ask(client.texts, query), strict=True):
        ours = tokenizer.decode([token])
        if theirs is None or "\ufffd" in theirs + ours:  # a part of a character: no text of its own
            continue
        compared += 1
        if theirs != ours:
            raise ValueError(
                f"the teacher at {client.url} must have the policy's tokenizer, got another: token "
                f"{token} is {ours!r} for the policy and {theirs!r} for the teacher; serve a model "
                "of the policy's family"
            )
    return f"{compared} of {size:,} tokens compared, up to id {chosen[-1]:,}: the same"


def check_scores(
    config: TrainConfig, client: TeacherClient, tokenizer: Any, examples: list[Example]
) -> str:
    """The teacher's mean log-probability of a few prompts, beside that of a uniform guess.

    Raises: TeacherError where it does not give finite ones.
    """
    total, count = 0.0, 0
    for example in examples:
        ids = encode_prompt(tokenizer, example, config.data)
        if len(ids) > 1:
            found = _ask(client.logprobs, Query(f"prompt {example.id}", ids[:1], ids[1:]))
            total, count = total + found.sum().item(), count + len(found)
    uniform = -math.log(client.vocab_size or len(tokenizer))
    return f"{total / max(count, 1):.2f} nats per prompt token (uniform guess: {uniform:.2f})"


def _ask(ask: Any, query: Query) -> Any:
    """One try: a run that has not begun need not wait."""
    try:
        return ask(query)
    except NoAnswerError as error:
        raise TeacherError(
            f"model.teacher must answer, got {error} for {query.name}: see the server's log"
        ) from error
