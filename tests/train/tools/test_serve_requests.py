"""serve: what a client sends is bounded before it is read, and what is wrong does not come back."""

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import httpx2

from kdrl_train.config import ModelConfig, TeacherConfig
from kdrl_train.model.teacher.client import Query, TeacherError
from kdrl_train.model.teacher.openai import connect
from kdrl_train.tools.serve import app as app_module
from kdrl_train.tools.serve import command, requests
from kdrl_train.tools.serve.app import make
from tests.train.servers import running, service

GOOD = {"ids": [5, 6, 7], "prompt_tokens": 2}
BODY = json.dumps({"sequences": [GOOD]}).encode()
PLAIN = {"content-type": "application/json"}
LARGEST = requests.body_bytes(1000, 64)


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> command.ServedTeacher:
    return service(folders["teacher"], queue_size=64)


def send(app: Any, method: str, path: str, **options: Any) -> httpx2.Response:
    """Sends one request, without a network."""

    async def go() -> httpx2.Response:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://teacher") as client:
            return await client.request(method, path, **options)

    return asyncio.run(go())


MANY = 1_000_000
HOSTILE = {
    "empty sequences": (b'{"sequences": [' + b"{}," * MANY, "sequences must hold 1 to 64 seque"),
    "empty lists": (b'{"sequences": [' + b"[]," * MANY, "sequences must hold 1 to 64 sequences"),
    "depth": (b"[" * MANY, "sequences must hold 1 to 64 sequences, got 999999"),
    "keys": (b'{"a":1' + b',"a":1' * 900, "with no other keys"),
    "unknown keys": (
        b'{"sequences":[]' + b',"a":1' * 120 + b"}",
        "a: Extra inputs are not permitted",
    ),
    "wrong ids": (b'{"sequences": [{"ids": [' + b'"x",' * 900 + b"1]}]}", "sequences.0.ids.0: "),
    "digits": (b'{"sequences": [], "vocab_size": ' + b"9" * 5000 + b"}", "number out of range"),
    "nesting": (b'{"sequences": ' + b"[" * 60 + b"]" * 60 + b"}", "sequences.0: Input should"),
    "broken text": (b'{"sequences": "\xff\xfe"}', "the body: Invalid JSON"),
    "nothing": (b"", "the body: Invalid JSON"),
}


@pytest.mark.fault("attack on serve")
@pytest.mark.parametrize(("body", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_is_refused_at_its_first_error(body: bytes, message: str) -> None:
    start = time.thread_time()
    with pytest.raises(ValueError, match=message):
        requests.jobs_of(requests.read(body, 1000, 64), {"vocab_size": 258, "window": 256}, 64)
    assert time.thread_time() - start < 0.2  # 5 MB took 30 s


@pytest.mark.fault("attack on serve")
def test_many_objects_are_counted_and_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million empty sequences took a gigabyte of objects and errors."""

    def make_objects(_body: bytes) -> None:
        raise AssertionError("the body must not be parsed")

    monkeypatch.setattr(requests.ScoreRequest, "model_validate_json", make_objects)
    for body in (b"{}," * 66, b"[]," * 66, b"1," * 1100, b'"a":1,' * 140):
        with pytest.raises(ValueError, match=r"must hold"):
            requests.read(body, 1000, 64)


def test_the_largest_request_fits() -> None:
    """64 sequences of 1,000 tokens in all, with all keys and ids of six digits."""
    lengths = [16] * 40 + [15] * 24  # 640 + 360
    sequences = [{"ids": [123456] * n, "prompt_tokens": n - 1} for n in lengths]
    sent = {"sequences": sequences, "temperature": 1.0, "vocab_size": 200_000}
    body = json.dumps(sent).encode()
    assert len(body) <= LARGEST
    assert [len(s.ids) for s in requests.read(body, 1000, 64).sequences] == lengths
    with pytest.raises(requests.TooLargeError, match="at most 990 tokens, got 1000"):
        requests.read(body, 990, 64)


@pytest.mark.fault("attack on serve")
def test_a_large_body_is_not_received(loaded: command.ServedTeacher) -> None:
    """One that says its length is refused at once, another one after its first bytes too many."""
    sizes: list[int] = []

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(1000):
            sizes.append(4096)
            yield b" " * 4096

    app = make(loaded, request_tokens=1000)
    message = f"a request must have at most {LARGEST} bytes, got "
    for headers in (PLAIN | {"content-length": str(10**9)}, PLAIN):
        reply = send(app, "POST", "/score", content=chunks(), headers=headers)
        assert reply.status_code == 413
        assert message in reply.json()["detail"]
    assert sum(sizes) <= 4096 + LARGEST + 2 * 4096
    assert send(app, "POST", "/score", content=BODY, headers=PLAIN).status_code == 200


@pytest.mark.fault("attack on serve")
@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "identity, gzip"])
def test_a_compressed_body_is_refused(loaded: command.ServedTeacher, encoding: str) -> None:
    headers = PLAIN | {"content-encoding": encoding}
    reply = send(make(loaded), "POST", "/score", content=gzip.compress(BODY), headers=headers)
    assert (reply.status_code, "must not be compressed" in reply.text) == (415, True)


@pytest.mark.fault("attack on serve")
def test_a_page_in_a_browser_cannot_send_requests(loaded: command.ServedTeacher) -> None:
    """Another type of content than JSON needs no permission of the server."""
    for headers in ({"content-type": "text/plain"}, {}):
        reply = send(make(loaded), "POST", "/score", content=BODY, headers=headers)
        assert (reply.status_code, "must be application/json" in reply.text) == (415, True)


@pytest.mark.fault("attack on serve")
def test_the_bodies_in_memory_are_bounded_and_counted_down(
    loaded: command.ServedTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[app_module.Bodies] = []
    original = app_module.Bodies
    monkeypatch.setattr(app_module, "Bodies", lambda: bodies.append(original()) or bodies[-1])
    app = make(loaded, request_tokens=1000)
    for content, status in ((BODY, 200), (b"{", 422), (b" " * (LARGEST + 1), 413)):
        assert send(app, "POST", "/score", content=content, headers=PLAIN).status_code == status
        assert bodies[0].total == 0
    bodies[0].total = app_module.BODIES * LARGEST  # others are being received
    reply = send(app, "POST", "/score", content=BODY, headers=PLAIN)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert bodies[0].total == app_module.BODIES * LARGEST


@pytest.mark.fault("attack on serve")
@pytest.mark.parametrize(
    "body",
    [
        {"sequences": "my secret"},
        {"sequences": [GOOD | {"ids": ["my secret"]}]},
        {"sequences": [GOOD], "x" * 10_000: "my secret"},
        {"sequences": [GOOD], "vocab_size": int("7" * 4000)},
        "my secret",
    ],
)
def test_errors_do_not_send_the_body_back(loaded: command.ServedTeacher, body: Any) -> None:
    reply = send(make(loaded), "POST", "/score", json=body)
    assert reply.status_code == 422
    assert "my secret" not in reply.text
    assert len(reply.text) < 400


@pytest.mark.fault("attack on serve")
@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer s3cret", 200),
        ("bearer s3cret", 200),
        (None, 401),
        ("Bearer s3cre", 401),
        ("Bearer s3cret2", 401),
        ("Bearer ", 401),
        ("Basic s3cret", 401),
        ("s3cret", 401),
        (b"Bearer s3cr\xe9t", 401),
    ],
)
def test_every_request_but_health_needs_the_token(
    loaded: command.ServedTeacher, header: str | bytes | None, status: int
) -> None:
    app = make(loaded, token="s3cret")
    headers = PLAIN | ({} if header is None else {"authorization": header})
    assert send(app, "GET", "/health").json() == {"status": "ready"}
    assert send(app, "GET", "/version", headers=headers).status_code == status
    assert send(app, "POST", "/score", content=BODY, headers=headers).status_code == status
    for path in ("/docs", "/openapi.json", "/nothing", "/health/", "//health"):
        refused = send(app, "GET", path, headers=headers).status_code
        assert refused == (status if status == 401 else 404 if path != "/health/" else 307)


def test_a_trainer_brings_the_token(
    loaded: command.ServedTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(make(loaded, token="s3cret")) as url:
        model = ModelConfig(teacher=url)
        monkeypatch.delenv("KDRL_TEACHER_TOKEN", raising=False)
        with pytest.raises(TeacherError, match=r"status 401.* set KDRL_TEACHER_TOKEN to it"):
            connect(model, TeacherConfig())
        monkeypatch.setenv("KDRL_TEACHER_TOKEN", "s3cret")
        client = connect(model, TeacherConfig())
        assert client.logprobs(Query("a completion", [5, 6], [7])).shape == (1,)
        client.close()
