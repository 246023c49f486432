"""What the tests of signals share."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def hangup() -> Iterator[None]:
    """Gives SIGHUP its usual effect, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
