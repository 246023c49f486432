"""Defines how the trainer waits for work outside of its thread: it polls, and it tries again."""

import random
import time
from collections.abc import Callable, Iterator

Poll = Callable[[], None]
"""Called regularly while the trainer samples, verifies or waits for a server; an exception that it
raises stops that work. A run passes a function that raises Stopped once a signal has come."""

POLL_S = 0.2
"""Seconds between two calls of a Poll while the trainer waits."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 15.0
"""Bounds of the waits of `retry_waits`, in seconds, before the random factor."""


def retry_waits() -> Iterator[float]:
    """Yield, without end, the seconds to wait before each new try of a request that failed.

    The wait starts at FIRST_WAIT_S and doubles after each try, up to LONGEST_WAIT_S. A random
    factor in [0.5, 1] keeps many clients from coming back at the same moment. The caller decides
    which errors are worth a new try, and when to give up.
    """
    wait_s = FIRST_WAIT_S
    while True:
        yield wait_s * random.uniform(0.5, 1)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def pause(seconds: float, poll: Poll) -> None:
    """Wait, and call poll regularly."""
    end = time.monotonic() + seconds
    while (left_s := end - time.monotonic()) > 0:
        poll()
        time.sleep(min(left_s, POLL_S))
