"""waiting: the one rule for new tries, by hand."""

from itertools import islice

import pytest

from kdrl_train import waiting
from kdrl_train.waiting import retry_waits


def test_waits_double_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting.random, "uniform", lambda _low, high: high)
    assert list(islice(retry_waits(), 8)) == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    assert next(retry_waits()) == 0.25  # each request starts anew


def test_waits_differ_between_clients() -> None:
    firsts = [next(retry_waits()) for _ in range(100)]
    assert 0.125 <= min(firsts) < max(firsts) <= 0.25
    assert len(set(firsts)) > 50
