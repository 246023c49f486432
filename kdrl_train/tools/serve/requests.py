"""Reads the requests to a teacher's server, whoever sends them: bounded, and up to the first error.

Nothing here needs a package of the extra `serve`.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from safetensors.torch import save

from kdrl_train.tools.serve.scorer import MOST_IDS, Arrays, Job

Ids = Annotated[list[int], FailFast()]
FLOAT32 = torch.finfo(torch.float32)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
MESSAGE = 300
"""Most letters of a message: it may hold a name or number that the client made up."""


class TooLargeError(ValueError):
    """Says that a request is larger than the server accepts."""


class TokenSequence(BaseModel):
    """Holds the token ids of a prompt and its completion."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ids: Ids
    prompt_tokens: int
    extra_tokens: Ids = Field(default_factory=list)
    """K other ids to score for each token of the completion, one token's after the other's."""


class ScoreRequest(BaseModel):
    """Is the body of POST /score and, without topk and extra_tokens, of POST /hidden."""

    model_config = ConfigDict(strict=True, extra="forbid")
    sequences: Annotated[list[TokenSequence], FailFast()]
    temperature: float = 1.0
    vocab_size: int | None = None
    topk: int | None = None
    """How many of the likeliest tokens to return for each token of a completion."""


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
    lists = 1 + (b'"extra_tokens"' in body)
    sequences = max(body.count(b"{"), -(-body.count(b"[") // lists)) - 1
    if sequences > queue_size:
        raise ValueError(f"sequences must hold 1 to {queue_size} sequences, got {sequences}")
    tokens = body.count(b",") - sequences - 1 - (b'"topk"' in body)
    if tokens > request_tokens:
        raise TooLargeError(f"a request must hold at most {request_tokens} tokens, got {tokens}")
    if body.count(b":") > (1 + lists) * queue_size + 4:
        raise ValueError(f"sequences must hold 1 to {queue_size} sequences, with no other keys")
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "the body"
        raise ValueError(f"{field:.100}: {first['msg']}") from None


def jobs_of(
    request: ScoreRequest, info: dict[str, Any], queue_size: int, *, states: bool = False
) -> list[Job]:
    """Turns the sequences of a request into jobs.

    Args:
        info: the reply of /version.
        queue_size: most sequences of one request.
        states: whether it asks for hidden states.
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
    _check_topk(request, vocab_size, states)
    jobs: list[Job] = []
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
        _check_ids(ids, f"sequences.{i}.ids", vocab_size)
        job = Job(
            torch.tensor(ids[:n]),
            torch.tensor(ids[n:]),
            request.temperature,
            vocab_size,
            states=states,
            topk=request.topk or 0,
            extra_tokens=_extra_tokens(sequence, i, vocab_size),
        )
        if jobs and job.kind != jobs[0].kind:
            raise ValueError(
                f"sequences.{i}.extra_tokens must hold as many ids for each token as those of "
                "sequences.0, got others"
            )
        jobs.append(job)
    return jobs


def _check_topk(request: ScoreRequest, vocab_size: int, states: bool) -> None:
    """Raises ValueError for a topk that is out of range, and for what has no meaning for states."""
    most = min(MOST_IDS, vocab_size)
    if request.topk is not None and not 1 <= request.topk <= most:
        raise ValueError(f"topk must be in [1, {most}], got {request.topk}")
    extra = any(sequence.extra_tokens for sequence in request.sequences)
    if states and (request.topk is not None or extra):
        raise ValueError("topk and extra_tokens must be left out for hidden states, got one")


def _check_ids(ids: list[int], name: str, vocab_size: int) -> None:
    for t, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}.{t} must be in [0, {vocab_size}), got {token}")


def _extra_tokens(sequence: TokenSequence, i: int, vocab_size: int) -> torch.Tensor | None:
    """Returns the other ids [T, K] of a sequence; None where there are none."""
    extra, T = sequence.extra_tokens, len(sequence.ids) - sequence.prompt_tokens
    if not extra:
        return None
    if len(extra) % T or len(extra) > T * MOST_IDS:
        raise ValueError(
            f"sequences.{i}.extra_tokens must hold 1 to {MOST_IDS} ids for each of the {T} tokens "
            f"of the completion, got {len(extra)}"
        )
    _check_ids(extra, f"sequences.{i}.extra_tokens", vocab_size)
    return torch.tensor(extra).view(T, -1)


def reply_bytes(jobs: list[Job], info: dict[str, Any]) -> int:
    """Counts the bytes of the arrays that a request gets; 0 for a reply in JSON."""
    first, tokens = jobs[0], sum(len(job.completion_ids) for job in jobs)
    if first.states:
        return tokens * int(info["hidden_size"]) * DTYPE_BYTES[info["dtype"]]
    extra = 0 if first.extra_tokens is None else first.extra_tokens.shape[1]
    return 4 * tokens * (1 + 2 * first.topk + extra) if first.topk or extra else 0


def reply(results: Sequence[torch.Tensor | Arrays], fingerprint: str) -> bytes:
    """Writes the reply to a request: log-probabilities alone as JSON, arrays as safetensors.

    In JSON: logprobs, a list for each sequence, and fingerprint. In the format of safetensors: each
    array by the name `0.states`, with the number of its sequence, and the fingerprint as metadata.

    Raises: ValueError for a token of probability 0, and states that are not finite.
    """
    plain = [result for result in results if isinstance(result, torch.Tensor)]
    arrays = [result for result in results if isinstance(result, dict)]
    _check_finite(plain or [part["logprobs"] for part in arrays if "logprobs" in part])
    if not arrays:
        return _json_reply(plain, fingerprint).encode()
    named: Arrays = {}
    for i, part in enumerate(arrays):
        if "states" in part and not part["states"].isfinite().all():
            raise ValueError(f"sequences.{i} must have finite states, got others: it overflows")
        named |= {f"{i}.{name}": array.contiguous() for name, array in part.items()}
    return save(named, {"fingerprint": fingerprint})


def _check_finite(scores: list[torch.Tensor]) -> None:
    """Raises ValueError for a token of probability 0."""
    for i, logprobs in enumerate(scores):
        for t in (~logprobs.isfinite()).nonzero().flatten().tolist():
            raise ValueError(
                f"sequences.{i} must have finite log-probabilities, got {logprobs[t]} for "
                f"token {t} of its completion: this model gives that token probability 0"
            )


def _json_reply(scores: list[torch.Tensor], fingerprint: str) -> str:
    """Writes log-probabilities as JSON; the thread lets others work in between."""
    # json.dumps would hold Python's lock for a second at a million numbers
    lists = (f"[{','.join(repr(x) for x in logprobs.tolist())}]" for logprobs in scores)
    return f'{{"logprobs":[{",".join(lists)}],"fingerprint":"{fingerprint}"}}'
