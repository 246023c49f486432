"""Answers the requests to a teacher's server, described in command.py. Needs the extra `serve`."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from kdrl_train.tools.serve import requests
from kdrl_train.tools.serve.replies import REPLY_BYTES, ArraysResponse, Replies
from kdrl_train.tools.serve.requests import MESSAGE, TooLargeError
from kdrl_train.tools.serve.scorer import Job, Scorer, ServedTeacher

UNKNOWN, TOO_LARGE, FORMAT, WRONG, GONE, FAILED, BUSY = 401, 413, 415, 422, 499, 500, 503
"""Status codes: a token is missing; the request is too large; it is not plain JSON; it is wrong;
the client has left; the model failed; try again later."""
POLL_S = 0.2
"""Seconds between two checks that a client is still connected."""
BODIES = 16
"""Bodies of the largest size that may be in memory at a time."""
REQUEST_TOKENS = 2**20


def make(
    served: ServedTeacher,
    request_tokens: int = REQUEST_TOKENS,
    token: str | None = None,
    reply_bytes: int = REPLY_BYTES,
) -> FastAPI:
    """Makes the application of one teacher, which may still be loading.

    Args:
        request_tokens: most tokens of one request.
        token: what every request but /health must bring; None: nothing.
        reply_bytes: most bytes of the arrays of one reply.
    """
    app = FastAPI(title="kdrl_train teacher", openapi_url=None)
    if token is not None:
        app.add_middleware(RequireToken, token=token)
    replier = Replier(served, request_tokens, Replies(reply_bytes))

    @app.get("/health")
    async def health() -> JSONResponse:
        if served.scorer is None:
            return JSONResponse({"status": "loading"}, BUSY)
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def version() -> JSONResponse:
        return JSONResponse(_ready(served)[1])

    @app.post("/score")
    async def score(connection: Request) -> Response:
        with _named_errors():
            return await replier.reply(connection, states=False)

    @app.post("/hidden")
    async def hidden(connection: Request) -> Response:
        with _named_errors():
            return await replier.reply(connection, states=True)

    return app


class Replier:
    """Reads requests for scores or states, has the teacher compute them, and makes the replies."""

    def __init__(self, served: ServedTeacher, request_tokens: int, replies: Replies) -> None:
        self.served = served
        self.request_tokens = request_tokens
        self.replies = replies
        self.bodies = Bodies()
        self.worker = ThreadPoolExecutor(1, "requests")  # one: what a request takes to read adds up

    async def reply(self, connection: Request, *, states: bool) -> Response:
        scorer, info = _ready(self.served)
        most = requests.body_bytes(self.request_tokens, scorer.queue_size)

        def read() -> list[Job]:
            request = requests.read(body, self.request_tokens, scorer.queue_size)
            return requests.jobs_of(request, info, scorer.queue_size, states=states)

        run = asyncio.get_running_loop().run_in_executor
        with ExitStack() as stack:
            async with self.bodies.of(connection, most) as body:
                jobs = await run(self.worker, read)
                body.clear()
                size = requests.reply_bytes(jobs, info)
                stack.enter_context(self.replies.of(size))
                if not scorer.submit(jobs):
                    raise HTTPException(BUSY, "too many sequences wait", {"Retry-After": "1"})
                results = await _results(jobs, scorer, connection)
                reply = await run(self.worker, requests.reply, results, info["fingerprint"])
            if not size:
                return Response(reply, media_type="application/json")
            return ArraysResponse(reply, stack.pop_all())


@contextmanager
def _named_errors() -> Iterator[None]:
    """Gives each error of a request its status code."""
    try:
        yield
    except TooLargeError as error:
        raise HTTPException(TOO_LARGE, str(error)[:MESSAGE]) from None
    except ValueError as error:
        raise HTTPException(WRONG, str(error)[:MESSAGE]) from None
    except ClientDisconnect:
        raise HTTPException(GONE, "the client has left") from None


class RequireToken:
    """Refuses every request but /health that lacks the token, before its body is read."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and scope["path"] != "/health":
            scheme, _, token = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token, self.token):
                detail = "the request must bring the server's token: set KDRL_TEACHER_TOKEN to it"
                headers = {"WWW-Authenticate": "Bearer"}
                app = JSONResponse({"detail": detail}, UNKNOWN, headers)
        await app(scope, receive, send)


class Bodies:
    """Receives the bodies of requests, and bounds how many bytes of them there are in all."""

    def __init__(self) -> None:
        self.total = 0

    @asynccontextmanager
    async def of(self, connection: Request, most: int) -> AsyncIterator[bytearray]:
        """Yields the body of a request, which counts until the block ends.

        Args:
            most: bytes of the largest body.
        Raises: HTTPException for what is not plain JSON or too large; ClientDisconnect.
        """
        headers = connection.headers
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(FORMAT, "content-type must be application/json")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise HTTPException(FORMAT, "the body must not be compressed: drop content-encoding")
        announced, size = headers.get("content-length", ""), 0
        body = bytearray()
        try:
            _require_fit(int(announced) if announced.isdecimal() else 0, most)
            async for chunk in connection.stream():
                size += len(chunk)
                self.total += len(chunk)
                _require_fit(size, most)
                if self.total > BODIES * most:
                    raise HTTPException(BUSY, "too many requests wait", {"Retry-After": "1"})
                body += chunk
            yield body
        finally:
            self.total -= size


def _require_fit(size: int, most: int) -> None:
    if size > most:
        raise TooLargeError(f"a request must have at most {most} bytes, got {size}")


async def _results(
    jobs: list[Job], scorer: Scorer, connection: Request
) -> list[torch.Tensor | dict[str, torch.Tensor]]:
    """Waits for the result of each job; withdraws the jobs if the client has left.

    Raises: HTTPException if the model failed or the server stops; ClientDisconnect.
    """
    futures = (asyncio.wrap_future(job.result) for job in jobs)
    results = asyncio.gather(*futures, return_exceptions=True)
    try:
        while not (await asyncio.wait([results], timeout=POLL_S))[0]:
            if await connection.is_disconnected():
                raise ClientDisconnect
    except asyncio.CancelledError:  # by uvicorn, which waits for SHUTDOWN_S at most
        raise HTTPException(BUSY, "the server is stopping") from None
    finally:
        scorer.withdraw(jobs)
    computed = [part for part in results.result() if not isinstance(part, BaseException)]
    if len(computed) < len(jobs):
        error = next(part for part in results.result() if isinstance(part, BaseException))
        raise HTTPException(FAILED, f"{type(error).__name__}: {error}"[:MESSAGE])
    return computed


def _ready(served: ServedTeacher) -> tuple[Scorer, dict[str, Any]]:
    if served.scorer is None or served.info is None:
        raise HTTPException(BUSY, "the model is loading", {"Retry-After": "2"})
    return served.scorer, served.info
