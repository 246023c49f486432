"""serve: slow, idle and rude clients lose their connection, and nobody else loses theirs."""

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import httpx2
from torch import Tensor

from kdrl_train import cli
from kdrl_train.config import ModelConfig
from kdrl_train.model.policy import HeadedModel
from kdrl_train.tools.serve import command, listen
from kdrl_train.tools.serve import scorer as scorer_module
from kdrl_train.tools.serve.app import make
from kdrl_train.tools.serve.command import ServeConfig
from kdrl_train.tools.serve.scorer import Job, Scorer, score_packed
from tests.train.servers import free_port, service, started

BODY = json.dumps({"sequences": [{"ids": [5, 6, 7], "prompt_tokens": 2}]}).encode()
HEAD = b"POST /score HTTP/1.1\r\nhost: teacher\r\ncontent-type: application/json\r\n"
WHOLE = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
Held = tuple[threading.Event, threading.Event]


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> command.ServedTeacher:
    return service(folders["teacher"], queue_size=64)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    """Makes the teacher wait for the first event; it sets the second one when it runs."""
    gate, running = threading.Event(), threading.Event()

    def score(_model: HeadedModel, jobs: list[Job]) -> list[Tensor]:
        running.set()
        assert gate.wait(30)
        return [-job.completion_ids.float() for job in jobs]

    monkeypatch.setattr(scorer_module, "score_packed", score)
    return gate, running


@contextlib.contextmanager
def listening(app: Any, connections: int = 100, **tls: Any) -> Iterator[int]:
    """Runs an application as `serve` does, and yields its port."""
    port = free_port()
    with started(listen.server(app, "127.0.0.1", port, connections, **tls)):
        yield port


def connect(port: int, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(sent)
    return client


def is_closed(client: socket.socket) -> bool:
    """Reads a connection to its end; raises TimeoutError if that does not come."""
    with contextlib.suppress(ConnectionResetError):
        while client.recv(100_000):
            pass
    return True


def test_the_command_listens_while_it_loads(
    folders: dict[str, Path], served: command.ServedTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it scores as the model does."""
    servers, gate = [], threading.Event()
    make_server, load = listen.server, command.load

    def kept(*arguments: Any, **more: Any) -> Any:
        servers.append(make_server(*arguments, **more))
        return servers[-1]

    def held(*arguments: Any) -> None:
        assert gate.wait(30)
        load(*arguments)

    monkeypatch.setattr(listen, "server", kept)
    monkeypatch.setattr(command, "load", held)
    model = ModelConfig(teacher=str(folders["teacher"]), device="cpu")
    config = ServeConfig(model=model, port=free_port())
    thread = threading.Thread(target=command.main, args=(config,))
    thread.start()
    seen: list[str] = []
    try:
        with httpx2.Client(base_url=config.url, timeout=30) as client:
            end = time.monotonic() + 30
            while "ready" not in seen:
                assert time.monotonic() < end
                with contextlib.suppress(httpx2.TransportError):
                    seen.append(client.get("/health").json()["status"])
                    gate.set()
                time.sleep(0.02)
            reply = client.post("/score", json=json.loads(BODY)).json()
    finally:
        gate.set()
        for server in servers:
            server.should_exit = True
        thread.join()
    assert seen[0] == "loading"
    job = Job(torch.tensor([5, 6]), torch.tensor([7]), 1.0, 258)
    (expected,) = score_packed(served.scorer.model, [job])
    assert reply["logprobs"] == [pytest.approx(expected.tolist(), rel=1e-5)]
    assert reply["fingerprint"] == served.info["fingerprint"]


@pytest.mark.fault("attack on serve")
def test_a_request_that_is_not_whole_in_time_ends_its_connection(
    served: command.ServedTeacher, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """A byte now and then does not help, neither in the headers nor in the body, nor later."""
    monkeypatch.setattr(listen, "READ_S", 0.3)
    beginnings = [
        (b"", b""),
        (b"GET /health HTTP/1.1\r\nx: ", b" "),
        (HEAD + b"content-length: 900\r\n\r\n{", b" "),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n", b"1\r\n \r\n"),
    ] * 2
    record_property("tried", len(beginnings))
    with listening(make(served)) as port, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(port, WHOLE)) for _ in beginnings[:4]]
        assert all(client.recv(100_000).startswith(b"HTTP/1.1 200") for client in clients)
        clients += [stack.enter_context(connect(port)) for _ in beginnings[4:]]
        for now in range(5):
            for client, sent in zip(clients, beginnings, strict=True):
                with contextlib.suppress(ConnectionError):  # it is closed already
                    client.sendall(sent[min(now, 1)])
            time.sleep(0.1)
        assert all(is_closed(client) for client in clients)


@pytest.mark.fault("attack on serve")
def test_idle_connections_lock_nobody_out(served: command.ServedTeacher) -> None:
    with listening(make(served), connections=20) as port, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(port, HEAD)) for _ in range(60)]
        start = time.monotonic()
        reply = httpx2.post(
            f"http://127.0.0.1:{port}/score",
            content=BODY,
            headers={"content-type": "application/json"},
        )
        assert reply.status_code == 200
        assert time.monotonic() - start < 2
        assert all(is_closed(client) for client in slow[:40])  # those that waited longest


@pytest.mark.fault("attack on serve")
def test_a_request_that_is_scored_is_not_idle(
    served: command.ServedTeacher, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a long forward pass nor a flood of connections ends a request that is whole."""
    monkeypatch.setattr(listen, "READ_S", 0.3)
    gate, running = held
    with listening(make(served), 5) as port, contextlib.ExitStack() as stack:
        client = stack.enter_context(connect(port, WHOLE))
        assert running.wait(30)
        for _ in range(20):
            stack.enter_context(connect(port))
        time.sleep(0.5)
        gate.set()
        assert client.recv(100_000).startswith(b"HTTP/1.1 200")


@pytest.mark.fault("attack on serve")
def test_a_reply_that_nobody_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "READ_S", 0.3)
    monkeypatch.setattr(listen.H11Protocol, "connection_lost", lost := Recorder())

    async def large(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(30_000_000)})

    with listening(large) as port:
        for more in (b"", b"connection: close\r\n"):
            with connect(port, b"GET / HTTP/1.1\r\nhost: teacher\r\n" + more + b"\r\n"):
                deadline = time.monotonic() + 10
                while not lost.calls:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                lost.calls.clear()


class Recorder:
    """Is a method that records its calls before it does what uvicorn's does."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.original = listen.H11Protocol.connection_lost

    def __get__(self, connection: Any, _type: Any) -> Callable[[Any], None]:
        def call(error: Any) -> None:
            self.original(connection, error)
            self.calls.append(error)

        return call


@pytest.mark.fault("attack on serve")
def test_slow_clients_do_not_hold_the_end(
    served: command.ServedTeacher, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server does not wait for them; what they sent does not reach its output."""
    rude = [
        b"",
        HEAD + b"content-length: 900\r\n\r\n{",
        b"GET /\x1b[31m\x07 HTTP/1.1\r\n\r\n",
        b"GET /%1b[31m HTTP/1.1\r\nhost: \x1b[31m\r\n\r\n",
    ]
    with contextlib.ExitStack() as stack:
        with listening(make(served)) as port:
            clients = [stack.enter_context(connect(port, sent)) for sent in rude]
            assert clients[2].recv(100).startswith(b"HTTP/1.1 400")
            start = time.monotonic()
        assert time.monotonic() - start < listen.SHUTDOWN_S - 1
    written = "".join(capfd.readouterr())
    assert "[31m" not in written
    assert "Traceback" not in written


@pytest.mark.fault("stopped by a signal")
def test_a_request_that_is_scored_is_told_that_the_server_stops(
    served: command.ServedTeacher, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer sends it again, when the server is back."""
    monkeypatch.setattr(listen, "SHUTDOWN_S", 0.1)
    gate, running = held
    with contextlib.ExitStack() as stack:
        with listening(make(served)) as port:
            client = stack.enter_context(connect(port, WHOLE))
            assert running.wait(30)
        reply = client.recv(100_000) + client.recv(100_000)
    gate.set()
    assert reply.startswith(b"HTTP/1.1 503")
    assert b"the server is stopping" in reply


@pytest.mark.fault("attack on serve")
def test_a_client_that_leaves_gives_its_places_back(
    served: command.ServedTeacher, held: Held
) -> None:
    """Its sequences leave the queue at once, not when the model would have come to them."""
    gate, running = held

    def job(mark: int) -> Job:
        return Job(torch.ones(1, dtype=torch.int64), torch.tensor([mark]), 1.0, 258)

    scorer = Scorer(served.scorer.model, batch_tokens=10, queue_size=3)
    first, left, kept = job(1), [job(2), job(3)], job(4)
    assert scorer.submit([first])
    assert running.wait(30)
    assert scorer.submit([*left, kept])
    assert not scorer.submit([job(5)])
    scorer.withdraw([first, *left])  # the first one is with the model
    assert scorer.submit([last := job(6), job(7)])
    assert not scorer.submit([job(8)])
    gate.set()
    assert [one.result.result(30).item() for one in (first, kept, last)] == [-1, -4, -6]
    assert all(one.result.cancelled() for one in left)


@pytest.mark.fault("attack on serve")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.3", "teacher.example", "127.1"])
def test_the_network_needs_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDRL_SERVE_TOKEN", raising=False)
    config = ServeConfig(model=ModelConfig(teacher="somewhere"), host=host)
    with pytest.raises(ValueError, match=r"KDRL_SERVE_TOKEN must be set to listen at .*, got none"):
        command.main(config)
    monkeypatch.setenv("KDRL_SERVE_TOKEN", "s3cret")
    assert command.read_token(host) == "s3cret"


def test_this_machine_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDRL_SERVE_TOKEN", raising=False)
    assert [command.read_token(h) for h in ("127.0.0.1", "::1", "localhost", "127.8.0.1")] == (
        [None] * 4
    )


@pytest.mark.fault("attack on serve")
@pytest.mark.parametrize("token", ["", " ", "two words", "line\n", "caf\xe9", "\x1b[31m"])
def test_a_token_must_fit_a_header(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDRL_SERVE_TOKEN", token)
    with pytest.raises(ValueError, match="must be a word of printable ASCII") as caught:
        command.read_token("127.0.0.1")
    assert not token.strip() or token not in str(caught.value)


def test_tls_is_spoken_with_the_key(served: command.ServedTeacher, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_key = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate, "-keyout", key]
    subprocess.run([*make_key.split(), *files], check=True, capture_output=True)
    with listening(make(served), ssl_certfile=certificate, ssl_keyfile=key) as port:
        url = f"https://127.0.0.1:{port}/health"
        context = listen.uvicorn.config.ssl.create_default_context(cafile=certificate)
        assert httpx2.get(url, verify=context).json() == {"status": "ready"}


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_wrong_certificate_is_named(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cert.pem"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    options = ["--model.teacher", "somewhere", "--ssl-certfile", str(path)]
    assert cli.main(["serve", *options]) == 1
    assert "ssl_certfile and ssl_keyfile must be a certificate and" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"ssl_certfile must be set with ssl_keyfile, got none"):
        ServeConfig(ssl_keyfile=path)


def test_more_connections_than_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(listen.resource, "getrlimit", lambda _kind: (256, 1000))
    monkeypatch.setattr(listen.resource, "setrlimit", lambda _kind, pair: limits.append(pair))
    listen.server(None, "127.0.0.1", 1, connections=744)
    assert limits == [(1000, 1000)]
    with pytest.raises(ValueError, match="connections must be at most 744, got 745"):
        listen.server(None, "127.0.0.1", 1, connections=745)
