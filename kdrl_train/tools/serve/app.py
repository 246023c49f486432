"""The end points of a teacher's server; what they say: serve.py. Needs fastapi (extra `serve`)."""

import asyncio
import math
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from kdrl_train.tools.serve.scorer import Job, Scorer, Service

WRONG, GONE, FAILED, BUSY = 422, 499, 500, 503
"""Status of a request that can never be answered, of one that nobody waits for any more, of one
that failed, of one to send again."""
POLL_S = 0.2
"""Between two looks at whether a client still waits."""


class Sequence(BaseModel):
    """Token ids of a prompt and its completion."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ids: list[int]
    prompt_tokens: int


class ScoreRequest(BaseModel):
    """Body of POST /score."""

    model_config = ConfigDict(strict=True, extra="forbid")
    sequences: list[Sequence]
    temperature: float = 1.0
    vocab_size: int | None = None


def make(service: Service) -> FastAPI:
    """The application of one service, which may still be loading."""
    app = FastAPI(title="kdrl_train teacher")
    app.add_exception_handler(RequestValidationError, _wrong_shape)

    @app.get("/health")
    async def health() -> JSONResponse:
        if service.scorer is None:
            return JSONResponse({"status": "loading"}, BUSY)
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def version() -> JSONResponse:
        return JSONResponse(_ready(service)[1])

    @app.post("/score")
    async def score(request: ScoreRequest, connection: Request) -> JSONResponse:
        scorer, info = _ready(service)
        try:
            jobs = jobs_of(request, info, scorer.queue_size)
        except ValueError as error:
            raise HTTPException(WRONG, str(error)) from error
        if not scorer.submit(jobs):
            raise HTTPException(BUSY, "too many sequences wait", {"Retry-After": "1"})
        found = await _answers(jobs, connection)
        for i, logprobs in enumerate(found):
            for t in (~logprobs.isfinite()).nonzero().flatten().tolist():
                raise HTTPException(
                    WRONG,
                    f"sequences.{i} must have finite log-probabilities, got {logprobs[t]} for "
                    f"token {t} of its completion: this model cannot say that token there",
                )
        answer = {"logprobs": [x.tolist() for x in found], "fingerprint": info["fingerprint"]}
        return JSONResponse(answer)

    return app


async def _answers(jobs: list[Job], connection: Request) -> list[torch.Tensor]:
    """Log-probabilities [T] of each job. Jobs of a client that has gone never reach the model.

    Raises: HTTPException.
    """
    answers = asyncio.gather(*(asyncio.wrap_future(job.logprobs) for job in jobs))
    while not (await asyncio.wait([answers], timeout=POLL_S))[0]:
        if await connection.is_disconnected():
            for job in jobs:
                job.logprobs.cancel()
            raise HTTPException(GONE, "the client has gone")
    try:
        return answers.result()
    except Exception as error:  # whatever torch raised
        raise HTTPException(FAILED, f"{type(error).__name__}: {error}") from error


def jobs_of(request: ScoreRequest, info: dict[str, Any], queue_size: int) -> list[Job]:
    """The sequences of a request as jobs.

    Args:
        info: of /version.
        queue_size: most sequences of one request.
    Raises: ValueError naming the field and its value.
    """
    columns, window = info["vocab_size"], info["window"]
    limit = columns if request.vocab_size is None else request.vocab_size
    if not 1 <= limit <= columns:
        raise ValueError(f"vocab_size must be in [1, {columns}], got {limit}")
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
            if not 0 <= token < limit:
                raise ValueError(f"sequences.{i}.ids.{t} must be in [0, {limit}), got {token}")
        jobs.append(Job(torch.tensor(ids[:n]), torch.tensor(ids[n:]), request.temperature, limit))
    return jobs


def _ready(service: Service) -> tuple[Scorer, dict[str, Any]]:
    if service.scorer is None or service.info is None:
        raise HTTPException(BUSY, "the model is loading", {"Retry-After": "2"})
    return service.scorer, service.info


async def _wrong_shape(_request: Request, error: Exception) -> JSONResponse:
    """FastAPI's own finding in the form of the other messages: field, what it must be, value."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0]
    field = ".".join(map(str, found["loc"][1:])) or "the body"
    detail = f"{field}: {found['msg']}, got {found['input']!r:.100}"
    return JSONResponse({"detail": detail}, WRONG)
