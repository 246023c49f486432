"""Signals are remembered, and the handlers of before come back."""

import os
import signal
import threading

import pytest

from kdrl_train.runfolder.signals import Interrupt, Stopped

pytestmark = pytest.mark.fault("stopped by a signal")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_remembered_until_it_is_polled(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        interrupt.poll()
        os.kill(os.getpid(), number)
        assert (interrupt.requested, interrupt.signal) == (True, number.name)
        with pytest.raises(Stopped):
            interrupt.poll()
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_does_not_wait() -> None:
    with Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_does_not_wait_where_nothing_can_be_saved(number: signal.Signals) -> None:
    """Such as for a server that sends a byte every half second while the run starts."""
    with Interrupt() as interrupt:
        interrupt.starting = True
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupt.requested
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_second_sigterm_changes_nothing() -> None:
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested


def test_in_another_thread_it_leaves_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with Interrupt():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.fault("killed")
@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_whose_launcher_is_gone_stops(
    launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torchrun a parent may go: `nohup`, `&`."""
    interrupt = Interrupt(launched)
    interrupt.poll()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert interrupt.requested == launched
    assert interrupt.signal == ("torchrun is gone" if launched else None)
