"""Lets a command outlive the reader of its output: a closed pipe, a terminal that is gone."""

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Guarded:
    """A text stream that drops what is written once nobody can read it any more.

    Everything else is as in the stream. An error of a file, such as a full disk, is raised.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: OSError | None = None
        """The error of the write that found no reader; None: there is a reader."""

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, call: Callable[[], object]) -> None:
        """Call a method of the stream, unless its reader is gone."""
        if self.lost is not None:
            return
        try:
            call()
        except OSError as error:
            if not _no_reader(error, self.stream):
                raise
            self.lost = error
            _discard(self.stream)


def _no_reader(error: OSError, stream: TextIO) -> bool:
    """Say whether a write failed because the other end of a pipe, socket or terminal is gone."""
    if error.errno in (errno.EPIPE, errno.ECONNRESET):
        return True
    if error.errno not in (errno.EIO, errno.ENXIO):  # a terminal that is gone, or a broken disk
        return False
    return not stat.S_ISREG(os.fstat(stream.fileno()).st_mode)


def _discard(stream: TextIO) -> None:
    """Lead stdout or stderr to nowhere, also for libraries that write to its descriptor, for
    processes that are started later, and for what the stream still holds when Python ends."""
    descriptor = stream.fileno()
    if descriptor in (1, 2):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def guard(stream: Any) -> Any:
    """Return a stream, guarded; None, which Python has for a closed one, stays None."""
    return stream if stream is None or isinstance(stream, Guarded) else Guarded(stream)


@contextmanager
def guarded() -> Iterator[None]:
    """Guard stdout and stderr within the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(guard, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Guarded):
                stream.flush()  # here, as Python would complain at its end
        sys.stdout, sys.stderr = before


def loss(*streams: Any) -> OSError | None:
    """Return the error that ended a stream's readers: of these, of stdout or of stderr."""
    lost = (getattr(stream, "lost", None) for stream in (*streams, sys.stdout, sys.stderr))
    return next((error for error in lost if error is not None), None)
