"""SIGTERM and Ctrl-C: remembered, and obeyed where nothing is lost."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(Exception):  # noqa: N818  an event, not an error
    """The run was asked to stop; steps that are done are whole, the one at hand is dropped."""


class Interrupt:
    """From enter to exit, SIGTERM and SIGINT only set `requested`; a second SIGINT interrupts.

    A scheduler sends SIGTERM some seconds before it kills: the loop calls `poll` between tokens of
    a rollout and between micro-batches, and has a checkpoint written. Elsewhere than in the main
    thread it does nothing, as Python allows no handler there.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def poll(self) -> None:
        """Raises: Stopped once a signal has come."""
        if self.requested:
            raise Stopped

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for one in (signal.SIGTERM, signal.SIGINT):
                self._before[one] = signal.signal(one, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
