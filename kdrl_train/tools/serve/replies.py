"""Sends arrays to the clients of a teacher's server, bounded. Needs the extra `serve`."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from fastapi import HTTPException
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from kdrl_train.tools.serve.listen import READ_S
from kdrl_train.tools.serve.requests import TooLargeError

BUSY = 503
REPLY_BYTES = 2**29
REPLIES = 8
"""Replies of arrays, of the largest size, that may be in memory at a time; each takes up to three
times its bytes while it is written."""
PIECE_BYTES, SLOWEST = 2**20, 2**20
"""Bytes of a reply that are sent at a time, and bytes a second that a client must at least read."""
ARRAYS = "application/octet-stream"


class Replies:
    """Bounds how many bytes of arrays are in memory for replies.

    Args:
        most: bytes of the largest reply.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.total = 0

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Counts the bytes of a reply until the block ends.

        Raises: TooLargeError; HTTPException where too many wait to be computed or to be read.
        """
        if size > self.most:
            raise TooLargeError(
                f"a reply must have at most {self.most} bytes, got {size}: send fewer tokens, or "
                "serve with a larger --reply-bytes"
            )
        if self.total + size > REPLIES * self.most:
            raise HTTPException(BUSY, "too many replies wait", {"Retry-After": "1"})
        self.total += size
        try:
            yield
        finally:
            self.total -= size


class ArraysResponse(Response):
    """Sends arrays piece by piece, as fast as the client reads, and then gives their place up.

    Args:
        held: what is given up when the client has them, or has left, or is too slow.
    """

    def __init__(self, content: bytes, held: ExitStack) -> None:
        super().__init__(content, media_type=ARRAYS)
        self.held = held

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        status, headers = self.status_code, self.raw_headers
        data, self.body = memoryview(self.body), b""
        with self.held, suppress(TimeoutError):  # then uvicorn closes the connection
            async with asyncio.timeout(READ_S + len(data) / SLOWEST):
                await send({"type": "http.response.start", "status": status, "headers": headers})
                for start in range(0, len(data), PIECE_BYTES):
                    piece = bytes(data[start : start + PIECE_BYTES])
                    more = start + PIECE_BYTES < len(data)
                    await send({"type": "http.response.body", "body": piece, "more_body": more})
