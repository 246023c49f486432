"""Exchanges JSON, or bytes, with a server that may be slow, sick or hostile: bounded in time and in
size."""

import asyncio
import json
import os
import reprlib
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

import httpx2

from kdrl_train.proxies import is_loopback, proxy_note

T = TypeVar("T")

TRY_AGAIN = (429, 500, 502, 503, 504)
"""Status codes of a server that is full, loading or restarting."""
REPLY_BYTES, TOKEN_BYTES = 2**20, 1024
"""Most bytes of a reply besides its tokens (a chat template, a list of models), and for each token
of its request: vLLM writes about 150, more for a token with a long text."""
BROKEN_TRIES = 3
"""A server may be killed while it sends a reply; one that breaks as many in a row is sick."""
ERROR_BYTES = 500
"""How much of an error's text is read and shown."""


class NoReplyError(Exception):
    """Says that the server did not reply, so that a new try may help.

    Args:
        wait_s: seconds that the server told us to wait.
        status: the status code, where there is one.
        late: whether the deadline of the request has passed.
    """

    def __init__(
        self, message: str, wait_s: float = 0.0, status: int | None = None, late: bool = False
    ) -> None:
        super().__init__(message)
        self.wait_s = wait_s
        self.status = status
        self.late = late


class BadReplyError(Exception):
    """Says what is wrong with a reply, where a new try would not help.

    status: the status code, where that is what is wrong.
    """

    def __init__(self, problem: str, status: int | None = None) -> None:
        super().__init__(problem)
        self.status = status


class Exchange:
    """Sends requests to one server; threads may share one.

    They run in a thread of their own, on an event loop, since only there a request can be stopped
    wherever it stands: while it connects, sends, or reads the header or the body of its reply.

    Args:
        url: http://host:port, with or without /v1.
        setting: names the URL in messages.
        variable: the variable of the environment that holds the server's token, if it needs one.
    Raises: ValueError for another URL, or a proxy of the environment or token that cannot be used.
    """

    def __init__(self, url: str, setting: str, variable: str) -> None:
        if set(url) & set("@?#"):  # the message must not repeat what may be a password
            raise ValueError(
                f"{setting} must be http://host:port without a user, password or query, got one "
                f"of @ ? #: put the server's token into the environment variable {variable}"
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.variable = variable
        token = os.environ.get(variable, "")
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise ValueError(
                f"the environment variable {variable} must be a token of printable ASCII without "
                f"spaces, got {len(token)} characters with others: set it again, without a newline"
            )
        headers = {"accept-encoding": "identity"} | (
            {"authorization": f"Bearer {token}"} if token else {}
        )
        try:
            self._http = httpx2.AsyncClient(
                base_url=self.url,
                headers=headers,
                timeout=None,  # `json` bounds the whole exchange
                limits=httpx2.Limits(),  # the callers bound the requests that are open
                trust_env=not is_loopback(self.url),
                verify=not url.lower().startswith("http:"),  # without TLS: 50 ms of certificates
            )
        except (httpx2.InvalidURL, ValueError, ImportError) as error:  # the latter two: a proxy
            raise ValueError(
                f"{setting} must be a URL, got {url!r}{proxy_note(url)}: {error}"
            ) from error
        self._lock = threading.Lock()
        self._closed = False
        self._open: set[Future[Any]] = set()
        """Those that `start` has returned and that are not done."""
        self._loop = asyncio.new_event_loop()
        self._loop.getaddrinfo = _addresses  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._loop.run_forever, name="exchange", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the thread of the exchange; cancelling the future stops it.

        Raises: CancelledError once the exchange is closed.
        """
        with self._lock:
            if self._closed:
                work.close()
                raise CancelledError
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def close(self) -> None:
        """Stop all requests and close the connections; their futures raise CancelledError.

        May be called twice.
        """
        with self._lock:
            closed, self._closed = self._closed, True
            futures = list(self._open)
        for future in futures:
            future.cancel()
        if not closed:
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _finish(self) -> None:
        """Wait for the requests, which `close` has cancelled, and close the connections.

        Each ends the tasks that it has begun: to cancel a task of a library before its first step
        would leave what that step is to await without anybody who awaits it.
        """
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    async def json(
        self, method: str, path: str, body: Any, timeout_s: float, tokens: int = 0
    ) -> Any:
        """Send one request and return the JSON of its reply.

        Args:
            body: sent as JSON; None: nothing is sent.
            timeout_s: deadline of the whole exchange, from the connection to the last byte.
            tokens: how many tokens the reply is about, which bounds its length.
        Raises: NoReplyError where a new try may help, else BadReplyError.
        """
        most = REPLY_BYTES + TOKEN_BYTES * tokens
        data = await self.data(method, path, body, timeout_s, most)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:  # ValueError: also text that is not UTF-8
            raise BadReplyError(f"{_text(data)!r}{proxy_note(self.url)}") from error

    async def data(self, method: str, path: str, body: Any, timeout_s: float, most: int) -> bytes:
        """Send one request and return the bytes of its reply.

        Args:
            body, timeout_s: as json.
            most: bytes of the longest reply that is read.
        Raises: NoReplyError where a new try may help, else BadReplyError.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._whole(method, path, body, most)
        except TimeoutError as error:
            message = f"no whole reply within {timeout_s:g} s{proxy_note(self.url)}"
            raise NoReplyError(message, late=True) from error
        except httpx2.RequestError as error:
            message = f"{type(error).__name__} ({error}){proxy_note(self.url)}"
            raise NoReplyError(message) from error

    async def _whole(self, method: str, path: str, body: Any, most: int) -> bytes:
        """Return what _read does; a reply that is cut or no HTTP is read BROKEN_TRIES times."""
        tries = 0
        while True:
            try:
                return await self._read(method, path, body, most)
            except httpx2.RemoteProtocolError as error:
                if "without sending a response" in str(error):  # a server that ends, or its proxy
                    raise
                tries += 1
                if tries == BROKEN_TRIES:
                    note = f"{proxy_note(self.url)}, {tries} times"
                    raise BadReplyError(f"no whole HTTP reply ({error}){note}") from error

    async def _read(self, method: str, path: str, body: Any, most: int) -> bytes:
        """Return the bytes of a reply of status 200, which are at most `most`."""
        async with self._http.stream(method, path, json=body) as reply:
            if reply.status_code != 200:
                raise self._refusal(reply, await _first_bytes(reply, ERROR_BYTES))
            if (encoding := reply.headers.get("content-encoding", "identity")) != "identity":
                raise BadReplyError(f"a reply in {reprlib.repr(encoding)}, none was to be packed")
            data = await _first_bytes(reply, most)
            if len(data) > most:
                raise BadReplyError(f"more than {most:,} bytes, starting with {_text(data)!r}")
            return data

    def _refusal(self, reply: httpx2.Response, data: bytes) -> Exception:
        """Make the error of a reply with another status than 200."""
        status, note = reply.status_code, proxy_note(self.url)
        if status in TRY_AGAIN:
            wait = reply.headers.get("retry-after", "")
            wait_s = float(wait) if wait.isascii() and wait.isdigit() else 0.0
            return NoReplyError(f"status {status} ({_text(data)}){note}", wait_s, status)
        problem = f"status {status}: {_text(data)}{note}"
        if status in (401, 403):
            state = "another one is set" if os.environ.get(self.variable) else "it is not set"
            problem += f"; set the environment variable {self.variable} to its token, {state}"
        if place := reply.headers.get("location"):
            problem += f"; it sends us to {reprlib.repr(place)}, where we do not go"
        return BadReplyError(problem, status)


async def _addresses(*arguments: Any, **keywords: Any) -> Any:
    """Look a name up as socket.getaddrinfo does, which nothing can stop: in a thread that a process
    which ends does not wait for, as it does for asyncio's own."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def look_up() -> None:
        try:
            future.set_result(socket.getaddrinfo(*arguments, **keywords))
        except Exception as error:  # who awaits it raises it
            future.set_exception(error)

    threading.Thread(target=look_up, name="address", daemon=True).start()
    return await asyncio.wrap_future(future)


async def _first_bytes(reply: httpx2.Response, most: int) -> bytes:
    """Read a body up to the part that makes it longer than `most` bytes."""
    data = bytearray()
    async for part in reply.aiter_raw():
        data += part
        if len(data) > most:
            break
    return bytes(data)


def _text(data: bytes) -> str:
    """Return the start of a reply, for a message."""
    return data[:ERROR_BYTES].decode("utf-8", "backslashreplace")


def typed(value: Any, name: str, *kinds: type) -> Any:
    """Return a value of a reply. Raises: BadReplyError unless its type is one of `kinds`."""
    if type(value) not in kinds:  # so that true is no integer
        raise BadReplyError(f"{name} {reprlib.repr(value)}")
    return value


def member(parent: Any, name: str, *kinds: type) -> Any:
    """Return the value of a name in an object of a reply.

    Raises: BadReplyError unless it is there and its type is one of `kinds`.
    """
    if type(parent) is not dict or name not in parent:
        raise BadReplyError(f"{reprlib.repr(parent)} without {name}")
    return typed(parent[name], name, *kinds)


def only(parent: Any, name: str) -> Any:
    """Return the only value of a list in an object of a reply.

    Raises: BadReplyError unless the list is there and holds one value.
    """
    values = member(parent, name, list)
    if len(values) != 1:
        raise BadReplyError(f"{len(values)} values of {name} in place of 1")
    return values[0]
