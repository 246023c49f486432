"""Listens for the requests of a teacher's server. Needs the extra `serve`."""

import asyncio
import resource
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

READ_S = 20.0
"""Seconds in which a connection must bring a whole request, and in which it must read a reply."""
KEEP_ALIVE_S = 10
"""Seconds without a request after which a connection is closed; a trainer closes it after 5."""
SHUTDOWN_S = 5
"""Seconds that requests get to end after a signal."""
OTHER_FILES = 256
"""Files that the process may have open besides its connections."""


class TimedConnection(H11Protocol):
    """Is a connection with a deadline for each request, which uvicorn does not have.

    Where there are too many, the one goes that has waited longest for its client, so that clients
    which send nothing lock nobody out.
    """

    deadline: asyncio.TimerHandle | None = None
    """Runs while the client has to act: to send a request, or to read a reply."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) >= (self.limit_concurrency or 0):
            idle = [
                (connection.deadline.when(), id(connection), connection)
                for connection in self.connections
                if isinstance(connection, TimedConnection) and connection.deadline is not None
            ]
            if idle:
                _, _, oldest = min(idle)
                oldest._clear_deadline()
                oldest.transport.abort()
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # it may begin with the next request
        self._set_deadline()

    def shutdown(self) -> None:
        """End at once where the client has to send; what is being scored has SHUTDOWN_S."""
        if self.deadline is not None and not self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def _set_deadline(self) -> None:
        """Start the deadline where it does not run and the client has to act; else end it."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY) or self.transport.is_closing():
            if self.deadline is None:
                self.deadline = self.loop.call_later(READ_S, self.transport.abort)
        else:
            self._clear_deadline()

    def _clear_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


def server(app: Any, host: str, port: int, connections: int, **tls: Any) -> uvicorn.Server:
    """Make the server of an application.

    Args:
        connections: most of them at a time.
        tls: uvicorn's ssl_certfile and ssl_keyfile.
    Raises: ValueError if the certificate cannot be read, or so many files cannot be open.
    """
    _allow_files(connections + OTHER_FILES)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=TimedConnection,
        ws="none",
        log_level="error",  # a warning for each refused request would fill the log
        proxy_headers=False,
        server_header=False,
        limit_concurrency=connections + 1,  # uvicorn refuses from this number on
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
        **tls,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(
            f"ssl_certfile and ssl_keyfile must be a certificate and its key in PEM, got {error}"
        ) from error
    return uvicorn.Server(config)


def _allow_files(count: int) -> None:
    """Raise the number of files that the process may open, as far as it is allowed to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ValueError(
            f"connections must be at most {hard - OTHER_FILES}, got {count - OTHER_FILES}: the "
            f"system lets this process open {hard} files (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
