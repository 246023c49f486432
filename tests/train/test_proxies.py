"""A proxy of the environment is used for other machines, named in errors, never for loopback."""

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from kdrl_train.config import ModelConfig, TeacherConfig
from kdrl_train.errors import EngineError
from kdrl_train.model.teacher.client import TeacherError
from kdrl_train.model.teacher.openai import connect
from kdrl_train.proxies import is_exposed, is_loopback, proxy_note
from kdrl_train.rollouts.engines.vllm_client import VllmClient
from tests.train.servers import Scripted, by_position, running


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """Set HTTP_PROXY to a proxy that answers 503; give its address and the URLs it is sent."""
    urls: list[str] = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            urls.append(self.path)
            self.send_response(503)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HTTP_PROXY", f"http://user:secret@{address}")
    try:
        yield address, urls
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def teacher(url: str) -> str:
    """Connect to the teacher of a URL, and return its model's name."""
    client = connect(ModelConfig(teacher=url), TeacherConfig(timeout_s=5))
    client.close()
    return client.info.model


def models_of(url: str) -> Any:
    """Return what the sampling server of a URL says of its models."""
    with closing(VllmClient(url, 5)) as client:
        return client.send("GET", "/v1/models")


def test_loopback_is_reached_without_the_proxy(
    proxied: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(Scripted(by_position).app()) as url:
        named = url.replace("127.0.0.1", "localhost")
        assert [teacher(address) for address in (url, named)] == ["scripted", "scripted"]
        models = models_of(url)
        assert models["data"][0]["id"] == "scripted"
        monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")  # httpx2 lacks the package for it
        assert teacher(url) == "scripted"
    assert proxied[1] == []


def test_another_host_is_reached_through_the_proxy_and_the_error_names_it(
    proxied: tuple[str, list[str]],
) -> None:
    address, urls = proxied
    note = rf"through the proxy {address} of HTTP_PROXY.*add it to NO_PROXY"
    with pytest.raises(TeacherError, match=rf"got status 503 \(\) \({note}") as error:
        teacher("http://teacher.invalid:8000")
    assert "secret" not in str(error.value)
    with pytest.raises(EngineError, match=rf"got status 503 .*{note}"):
        models_of("http://sampler.invalid:8000")
    assert urls == [
        "http://teacher.invalid:8000/version",
        "http://sampler.invalid:8000/v1/models",
    ]


def test_a_proxy_that_cannot_be_used_is_named(
    proxied: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "nonsense://proxy:1")
    with pytest.raises(TeacherError, match=r"through the proxy proxy:1 of HTTP_PROXY"):
        teacher("http://teacher.invalid:8000")
    with pytest.raises(EngineError, match=r"through the proxy proxy:1 of HTTP_PROXY"):
        models_of("http://sampler.invalid:8000")
    assert proxied[1] == []


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("[::1]", True),
        ("[::ffff:127.0.0.1]", True),
        ("0.0.0.0", True),
        ("LOCALHOST", True),
        ("localhost.", True),
        ("teacher.localhost", True),
        ("128.0.0.1", False),
        ("10.0.0.1", False),
        ("[::2]", False),
        ("localhost.example.org", False),
        ("mylocalhost", False),
        ("[::1", False),
    ],
)
def test_loopback_addresses(host: str, loopback: bool) -> None:
    assert is_loopback(f"http://{host}:8000") == loopback
    assert is_loopback(f"https://{host}/v1") == loopback


def test_a_note_about_the_proxy_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP", "HTTPS", "ALL"):
        monkeypatch.delenv(f"{name}_PROXY", raising=False)
        monkeypatch.delenv(f"{name.lower()}_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "near.example.org")
    assert proxy_note("http://far.example.org") == ""
    monkeypatch.setenv("ALL_PROXY", "http://one:1")
    monkeypatch.setenv("HTTPS_PROXY", "two:2")
    assert "the proxy one:1 of ALL_PROXY" in proxy_note("http://far.example.org")
    assert "the proxy two:2 of HTTPS_PROXY" in proxy_note("https://far.example.org")
    assert proxy_note("https://near.example.org:8000") == ""
    assert proxy_note("https://127.0.0.1") == ""


@pytest.mark.parametrize(
    ("url", "addresses", "exposed"),
    [
        ("http://127.0.0.1:8000", [], False),
        ("http://localhost:8000", [], False),
        ("http://gpu-3:8000", ["10.1.2.3"], False),
        ("http://gpu-3:8000", ["192.168.0.7", "fd00::7"], False),
        ("http://gpu-3:8000", ["100.64.1.1"], False),  # a VPN's
        ("http://vllm.example", ["8.8.8.8"], True),
        ("HTTP://vllm.example", ["10.1.2.3", "2600::1"], True),
        ("https://vllm.example", ["8.8.8.8"], False),
        ("http://no.such.name", [], True),
    ],
)
def test_http_to_a_public_address_is_exposed(
    monkeypatch: pytest.MonkeyPatch, url: str, addresses: list[str], exposed: bool
) -> None:
    def resolve(_host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if not addresses:
            raise socket.gaierror("Name or service not known")
        return [(None, None, None, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert is_exposed(url) == exposed
