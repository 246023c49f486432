"""hub: a hub that does not reply costs seconds, and from then on its clients read their caches."""

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from huggingface_hub import constants, is_offline_mode

from kdrl_train import hub
from tests.train.servers import free_port


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket in the hub's place, where nobody reads what comes."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "DEADLINE_S", 0.2)
    with closing(socket.create_server(("127.0.0.1", 0))) as made:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{made.getsockname()[1]}")
        yield made


@pytest.mark.usefixtures("listener")
def test_a_hub_without_a_reply_costs_the_deadline() -> None:
    start = time.monotonic()
    why = hub.unreachable.__wrapped__()
    assert time.monotonic() - start < 2
    assert why.startswith(constants.ENDPOINT)
    assert is_offline_mode()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert hub.unreachable.__wrapped__() == "HF_HUB_OFFLINE is set"


@pytest.mark.usefixtures("listener")
def test_an_address_where_nobody_listens_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert "ConnectError" in hub.unreachable.__wrapped__()


def test_any_reply_will_do(listener: socket.socket) -> None:
    def reply() -> None:
        with listener.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n")

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(reply)
        assert hub.unreachable.__wrapped__() == ""
        done.result()
    assert not is_offline_mode()
