"""Answers the requests to a teacher's server, described in command.py. Needs the extra `serve`."""

import asyncio
import math
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from kdrl_train.tools.serve.scorer import Job, Scorer, ServedTeacher

WRONG, GONE, FAILED, BUSY = 422, 499, 500, 503
"""Status codes: the request is wrong; the client has left; the model failed; try again later."""
POLL_S = 0.2
"""Seconds between two checks that a client is still connected."""


class TokenSequence(BaseModel):
    """Holds the token ids of a prompt and its completion."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ids: list[int]
    prompt_tokens: int


class ScoreRequest(BaseModel):
    """Is the body of POST /score."""

    model_config = ConfigDict(strict=True, extra="forbid")
    sequences: list[TokenSequence]
    temperature: float = 1.0
    vocab_size: int | None = None


def make(served: ServedTeacher) -> FastAPI:
    """Makes the application of one teacher, which may still be loading."""
    app = FastAPI(title="kdrl_train teacher")
    app.add_exception_handler(RequestValidationError, _wrong_shape)

    @app.get("/health")
    async def health() -> JSONResponse:
        if served.scorer is None:
            return JSONResponse({"status": "loading"}, BUSY)
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def version() -> JSONResponse:
        return JSONResponse(_ready(served)[1])

    @app.post("/score")
    async def score(request: ScoreRequest, connection: Request) -> JSONResponse:
        scorer, info = _ready(served)
        try:
            jobs = jobs_of(request, info, scorer.queue_size)
        except ValueError as error:
            raise HTTPException(WRONG, str(error)) from error
        if not scorer.submit(jobs):
            raise HTTPException(BUSY, "too many sequences wait", {"Retry-After": "1"})
        scores = await _scores(jobs, connection)
        for i, logprobs in enumerate(scores):
            for t in (~logprobs.isfinite()).nonzero().flatten().tolist():
                raise HTTPException(
                    WRONG,
                    f"sequences.{i} must have finite log-probabilities, got {logprobs[t]} for "
                    f"token {t} of its completion: this model gives that token probability 0",
                )
        reply = {"logprobs": [x.tolist() for x in scores], "fingerprint": info["fingerprint"]}
        return JSONResponse(reply)

    return app


async def _scores(jobs: list[Job], connection: Request) -> list[torch.Tensor]:
    """Waits for the log-probabilities [T] of each job; cancels the jobs if the client has left.

    Raises: HTTPException if the client has left, or the model failed.
    """
    scores = asyncio.gather(*(asyncio.wrap_future(job.logprobs) for job in jobs))
    while not (await asyncio.wait([scores], timeout=POLL_S))[0]:
        if await connection.is_disconnected():
            for job in jobs:
                job.logprobs.cancel()
            raise HTTPException(GONE, "the client has left")
    try:
        return scores.result()
    except Exception as error:  # whatever torch raised
        raise HTTPException(FAILED, f"{type(error).__name__}: {error}") from error


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
    if not 0 < request.temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {request.temperature}")
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


def _ready(served: ServedTeacher) -> tuple[Scorer, dict[str, Any]]:
    if served.scorer is None or served.info is None:
        raise HTTPException(BUSY, "the model is loading", {"Retry-After": "2"})
    return served.scorer, served.info


async def _wrong_shape(_request: Request, error: Exception) -> JSONResponse:
    """Writes a validation error of FastAPI like the other messages: field, rule, value."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"][1:])) or "the body"
    detail = f"{field}: {first['msg']}, got {first['input']!r:.100}"
    return JSONResponse({"detail": detail}, WRONG)
