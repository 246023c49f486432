"""Remembers SIGTERM and Ctrl-C until the run is at a place where it can stop and lose nothing."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(Exception):  # noqa: N818  an event, not an error
    """A signal asked the run to stop: the steps that are done count, the current one is dropped."""


class Interrupt:
    """Within its block SIGTERM and SIGINT only set `requested`; a second SIGINT interrupts at once.

    A scheduler sends SIGTERM some seconds before it kills. The loop looks between the tokens of a
    rollout (`poll`) and between micro-batches, then stops and has a checkpoint written. In another
    thread than the main one the signals keep their effect, as Python allows no handler there.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def poll(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.requested:
            raise Stopped

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
