"""Reads the requests to a teacher's server, whoever sends them: bounded, and up to the first error.

Nothing here needs a package of the extra `serve`.
"""

from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, FailFast, ValidationError

from kdrl_train.tools.serve.scorer import Job

Ids = Annotated[list[int], FailFast()]
FLOAT32 = torch.finfo(torch.float32)
MESSAGE = 300
"""Most letters of a message: it may hold a name or number that the client made up."""


class TooLargeError(ValueError):
    """Says that a request is larger than the server accepts."""


class TokenSequence(BaseModel):
    """Holds the token ids of a prompt and its completion."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ids: Ids
    prompt_tokens: int


class ScoreRequest(BaseModel):
    """Is the body of POST /score."""

    model_config = ConfigDict(strict=True, extra="forbid")
    sequences: Annotated[list[TokenSequence], FailFast()]
    temperature: float = 1.0
    vocab_size: int | None = None


def body_bytes(request_tokens: int, queue_size: int) -> int:
    """Counts the bytes of the longest body: an id of six digits takes 8, a sequence's keys 40."""
    return 8 * request_tokens + 64 * queue_size + 1024


def read(body: bytes | bytearray, request_tokens: int, queue_size: int) -> ScoreRequest:
    """Reads the body of POST /score.

    What it holds is counted before it is read: 5 MB of empty sequences would become 4.5 GB of
    objects and errors. No text in a right request has one of the signs that are counted.

    Args:
        request_tokens: most tokens of one request.
        queue_size: most sequences of one request.
    Raises: TooLargeError; ValueError that names the first field that is wrong, without its value.
    """
    sequences = max(body.count(b"{"), body.count(b"[")) - 1
    if sequences > queue_size:
        raise ValueError(f"sequences must hold 1 to {queue_size} sequences, got {sequences}")
    tokens = body.count(b",") - sequences - 1
    if tokens > request_tokens:
        raise TooLargeError(f"a request must hold at most {request_tokens} tokens, got {tokens}")
    if body.count(b":") > 2 * queue_size + 3:
        raise ValueError(f"sequences must hold 1 to {queue_size} sequences, with no other keys")
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "the body"
        raise ValueError(f"{field:.100}: {first['msg']}") from None


def jobs_of(request: ScoreRequest, info: dict[str, Any], queue_size: int) -> list[Job]:
    """Turns the sequences of a request into jobs.

    Args:
        info: the reply of /version.
        queue_size: most sequences of one request.
    Raises: ValueError that names the field and its value.
    """
    head_size, window = info["vocab_size"], info["window"]
    vocab_size = head_size if request.vocab_size is None else request.vocab_size
    if not 1 <= vocab_size <= head_size:
        raise ValueError(f"vocab_size must be in [1, {head_size}], got {vocab_size}")
    if not FLOAT32.tiny <= request.temperature <= FLOAT32.max:  # 0 would fail the whole batch
        raise ValueError(
            f"temperature must be positive and finite in float32, got {request.temperature}"
        )
    if not 1 <= len(request.sequences) <= queue_size:
        raise ValueError(
            f"sequences must hold 1 to {queue_size} sequences, got {len(request.sequences)}"
        )
    jobs = []
    for i, sequence in enumerate(request.sequences):
        ids, n = sequence.ids, sequence.prompt_tokens
        if window is not None and len(ids) > window:
            raise ValueError(
                f"sequences.{i}.ids must fit the model's window of {window} tokens, got {len(ids)}"
            )
        if not 1 <= n < len(ids):
            raise ValueError(
                f"sequences.{i}.prompt_tokens must leave a prompt and a completion of the "
                f"{len(ids)} tokens, got {n}"
            )
        for t, token in enumerate(ids):
            if not 0 <= token < vocab_size:
                raise ValueError(f"sequences.{i}.ids.{t} must be in [0, {vocab_size}), got {token}")
        prompt, completion = torch.tensor(ids[:n]), torch.tensor(ids[n:])
        jobs.append(Job(prompt, completion, request.temperature, vocab_size))
    return jobs


def reply(scores: list[torch.Tensor], fingerprint: str) -> str:
    """Writes the reply to POST /score as JSON; the thread lets others work in between.

    Raises: ValueError for a token of probability 0.
    """
    for i, logprobs in enumerate(scores):
        for t in (~logprobs.isfinite()).nonzero().flatten().tolist():
            raise ValueError(
                f"sequences.{i} must have finite log-probabilities, got {logprobs[t]} for "
                f"token {t} of its completion: this model gives that token probability 0"
            )
    # json.dumps would hold Python's lock for a second at a million numbers
    lists = (f"[{','.join(repr(x) for x in logprobs.tolist())}]" for logprobs in scores)
    return f'{{"logprobs":[{",".join(lists)}],"fingerprint":"{fingerprint}"}}'
