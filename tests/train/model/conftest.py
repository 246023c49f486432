"""A fake of the teacher's server, for the tests of its client."""

import pytest

from kdrl_train.model.teacher import client
from tests.train.model.remote_teacher import FakeExchange


@pytest.fixture
def exchange(monkeypatch: pytest.MonkeyPatch) -> FakeExchange:
    """Put replies without a server in the place of a client's requests."""
    fake = FakeExchange()
    monkeypatch.setattr(client, "Exchange", lambda *_: fake)
    return fake
