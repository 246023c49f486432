"""Remembers SIGTERM, SIGHUP and Ctrl-C until the run can stop and lose nothing."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from kdrl_train import output


class Stopped(Exception):  # noqa: N818  an event, not an error
    """A signal asked the run to stop: the steps that are done count, the current one is dropped."""


SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP


class Interrupt:
    """Within its block a signal only sets `requested`; a second SIGINT interrupts at once.

    A scheduler sends SIGTERM some seconds before it kills, a terminal that closes sends SIGHUP. The
    loop looks between the tokens of a rollout (`poll`) and between micro-batches, then stops and
    has a checkpoint written. SIGHUP stays ignored where it was, as nohup has it. In another thread
    than the main one the signals keep their effect, as Python allows no handler there.

    launched: whether torchrun is the parent of this process. Where it is killed, its ranks get no
        signal; each sees that it has another parent, and stops as by SIGTERM.
    """

    def __init__(self, launched: bool = False) -> None:
        self._requested = False
        self._launcher = os.getppid() if launched else None
        self.signal: str | None = None
        """Name of the first signal that came."""
        self.starting = False
        """Whether no step is done yet that could be saved: a signal then interrupts at once, also
        where a server is asked that does not reply."""
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come, or torchrun is gone."""
        if self._launcher not in (None, os.getppid()):
            self.requested = True
            self.signal = self.signal or "torchrun is gone"
        return self._requested

    @requested.setter
    def requested(self, value: bool) -> None:
        self._requested = value

    def poll(self) -> None:
        """Raise Stopped if a signal has come; who polls has moved."""
        output.move()
        if self.requested:
            raise Stopped

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.starting or (number == signal.SIGINT and self.requested):
            raise KeyboardInterrupt
        self.requested = True
        self.signal = self.signal or signal.Signals(number).name

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                    continue
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
