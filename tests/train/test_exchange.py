"""exchange: a sick or hostile server costs no more than the deadline and the bytes of a request."""

import asyncio
import gc
import gzip
import socket
import threading
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import thread as executors
from contextlib import closing
from random import Random
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from kdrl_train.exchange import BadReplyError, Exchange, NoReplyError, member, only, typed
from tests.train.servers import http_reply, talking

Talk = Callable[[socket.socket], None]
HEADER = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n"


def reply_of(talk: Talk, timeout_s: float = 5.0, **options: Any) -> Any:
    with talking(talk) as url, closing(Exchange(url, "engine.url", "KDRL_TEST_TOKEN")) as exchange:
        return exchange.start(exchange.json("POST", "/x", {}, timeout_s, **options)).result()


def sends(data: bytes) -> Talk:
    return lambda connection: connection.sendall(data)


def drips(start: bytes) -> Talk:
    """Send `start`, then a byte every 50 ms for 20 s."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(400):
            time.sleep(0.05)
            connection.sendall(b"x")

    return talk


SLOW: dict[str, Talk] = {
    "status line": drips(b""),
    "header": drips(b"HTTP/1.1 200 OK\r\na: "),
    "body": drips(HEADER + b"\r\n"),
    "error's body": drips(b"HTTP/1.1 500 no\r\ncontent-length: 100\r\n\r\n"),
    "silence": lambda connection: all(iter(lambda: connection.recv(2**16), b"")),
}


@pytest.mark.fault("stopped by a signal")
def test_a_name_that_cannot_be_looked_up_holds_no_process_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python waits, before it ends, for every thread of an executor, also for a daemon."""
    over, before = threading.Event(), set(threading.enumerate())
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(5))
    with closing(Exchange("http://teacher.test", "engine.url", "KDRL_TEST_TOKEN")) as exchange:
        request = exchange.start(exchange.json("GET", "/x", None, 0.1))
        with pytest.raises(NoReplyError, match=r"no whole reply within 0\.1 s"):
            request.result()
    left = set(threading.enumerate()) - before
    assert [thread.daemon and thread not in executors._threads_queues for thread in left] == [True]
    over.set()
    left.pop().join()


@pytest.mark.fault("sick teacher server")
@pytest.mark.parametrize(
    "name",
    [n if n in ("header", "body") else pytest.param(n, marks=pytest.mark.slow) for n in SLOW],
)
def test_a_slow_reply_ends_at_the_deadline(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(NoReplyError, match=r"no whole reply within 0\.1 s") as error:
        reply_of(SLOW[name], 0.1)
    assert error.value.late
    assert time.monotonic() - start < 1.0


@pytest.mark.fault("sick teacher server")
@pytest.mark.parametrize("fault", ["connects", "sends", "header", "body"])
def test_close_ends_a_request_wherever_it_stands(fault: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        filling = []
        if fault == "connects":  # a full backlog leaves further connections without a reply
            for _ in range(4):
                filling.append(socket.socket())
                filling[-1].setblocking(False)
                filling[-1].connect_ex(listener.getsockname())
        exchange = Exchange(url, "engine.url", "KDRL_TEST_TOKEN")
        body = "x" * 2**24 if fault == "sends" else ""  # more than the buffers of the kernel
        future = exchange.start(exchange.json("POST", "/x", body, 60.0))
        if fault != "connects":
            connection, _ = listener.accept()
            connection.sendall({"header": b"HTTP/1.1 ", "body": HEADER + b"\r\n"}.get(fault, b""))
            filling.append(connection)
        time.sleep(0.05)
        assert not future.done()
        start = time.monotonic()
        exchange.close()
        exchange.close()
        assert time.monotonic() - start < 0.5
        assert future.cancelled()
        for one in filling:
            one.close()


@pytest.mark.fault("stopped by a signal")
def test_close_leaves_the_tasks_of_a_request_to_the_request() -> None:
    """Under load `close` cancelled the task in which a library connects before its first step, and
    the library's coroutine was never awaited."""
    begun, go_on = threading.Event(), threading.Event()

    async def connects() -> None:
        await asyncio.sleep(60)

    async def wraps(work: Coroutine[Any, Any, None]) -> None:  # as the library does
        await work

    async def request() -> None:
        begun.set()
        go_on.wait(5)  # until `close` is called
        await asyncio.sleep(0)
        await asyncio.create_task(wraps(connects()))

    exchange = Exchange("http://127.0.0.1:1", "engine.url", "KDRL_TEST_TOKEN")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        future = exchange.start(request())
        assert begun.wait(5)
        threading.Timer(0.05, go_on.set).start()
        exchange.close()
        assert future.cancelled()
        del future
        gc.collect()
    assert [str(one.message) for one in said if "never awaited" in str(one.message)] == []


MiB = 2**20
BOMB = gzip.compress(gzip.compress(b"0" * 64 * MiB))
WRONG: dict[str, tuple[bytes, type[Exception], str]] = {
    "broken gzip": (
        http_reply(b"\x1f\x8b123", content_encoding="gzip"),
        BadReplyError,
        "a reply in 'gzip', none was to be packed",
    ),
    "bomb": (http_reply(BOMB, content_encoding="gzip, gzip"), BadReplyError, "'gzip, gzip'"),
    "bomb without a word": (http_reply(BOMB), BadReplyError, r"\\x8b"),
    "cut": (http_reply(b"{}", content_length="9"), BadReplyError, r"no whole HTTP .*, 3 times"),
    "too short a length": (http_reply(b"[0, 1]", content_length="4"), BadReplyError, r"'\[0, '"),
    "no length": (http_reply(b"{}", content_length="-3"), BadReplyError, "no whole HTTP reply"),
    "broken chunks": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}",
        BadReplyError,
        "no whole HTTP reply",
    ),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", BadReplyError, "no whole HTTP reply"),
    "nothing": (b"", NoReplyError, "RemoteProtocolError"),
    "deep": (http_reply(b"[" * 100_000), BadReplyError, r"got|'\[\[\["),
    "long number": (http_reply(b"1" * 5000), BadReplyError, "'1111"),
    "not UTF-8": (http_reply(b'"\xff\xfe"'), BadReplyError, r"xff"),
    "a page": (http_reply(b"<html>"), BadReplyError, "'<html>'"),
    "empty": (http_reply(b""), BadReplyError, "''"),
    "redirect": (
        http_reply(b"", "302 Found", location="http://127.0.0.1:1/x"),
        BadReplyError,
        "status 302: ; it sends us to 'http://127.0.0.1:1/x', where we do not go",
    ),
    "refused": (http_reply(b"no", "404 Not Found"), BadReplyError, "status 404: no"),
    "a long error": (http_reply(b"e" * 64 * MiB, "400 No"), BadReplyError, "status 400: e{500}$"),
    "full": (http_reply(b"later", "429 Full"), NoReplyError, r"status 429 \(later\)"),
}


@pytest.mark.fault("sick teacher server")
@pytest.mark.parametrize("name", WRONG)
def test_a_sick_reply_is_an_error_that_shows_it(name: str) -> None:
    data, kind, message = WRONG[name]
    start = time.monotonic()
    with pytest.raises(kind, match=message) as error:
        reply_of(sends(data))
    assert time.monotonic() - start < 1.0
    assert len(str(error.value)) < 3000


@pytest.mark.fault("sick teacher server")
def test_a_reply_that_is_cut_once_is_read_again() -> None:
    parts = [http_reply(b"[1]", content_length="9"), http_reply(b"[1]")]
    assert reply_of(lambda connection: connection.sendall(parts.pop(0))) == [1]
    assert parts == []


def damaged(reply: bytes, random: Random) -> bytes:
    """Change, leave out or add a few bytes."""
    data = bytearray(reply)
    for _ in range(random.choice((1, 2, 5))):
        place = random.randrange(len(data))
        more = random.choice((b"\r\n\r\n", b"9" * 30, b"-1", random.randbytes(4), b""))
        data[place : place + random.randrange(20)] = more
    return bytes(data)


@pytest.mark.fault("sick teacher server")
def test_a_damaged_reply_is_no_other_error(record_property: Any) -> None:
    whole = (
        http_reply(b'{"a": [1, -0.5, "x"]}', set_cookie="a=b; path=/", etag="1"),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n[1,2,\r\n2\r\n3]\r\n0\r\n\r\n",
        http_reply(b"busy", "503 No", retry_after="1"),
        http_reply(b"{}", content_length="9" * 5000),
    )
    random, errors, current = Random(0), Counter[type[Exception]](), [b""]
    with talking(lambda connection: connection.sendall(current[0])) as url:
        for place in range(80):
            current[0] = damaged(whole[place % 4], random)
            with closing(Exchange(url, "engine.url", "KDRL_TEST_TOKEN")) as exchange:
                try:
                    exchange.start(exchange.json("GET", "/x", None, 5.0)).result()
                except (NoReplyError, BadReplyError) as error:
                    errors[type(error)] += 1
    record_property("tried", 80)
    assert errors[NoReplyError] > 5
    assert errors[BadReplyError] > 40


@pytest.mark.fault("sick teacher server")
@pytest.mark.parametrize("tokens", [0, 1000])
def test_a_reply_is_read_up_to_what_its_request_can_need(tokens: int) -> None:
    sent: list[int] = []

    def floods(connection: socket.socket) -> None:
        connection.sendall(HEADER.replace(b"100", b"200000000") + b"\r\n")
        for _ in range(200):
            connection.sendall(b"1" * MiB)
            sent.append(MiB)

    most = 1_048_576 + 1024 * tokens
    tracemalloc.start()
    with pytest.raises(BadReplyError, match=f"more than {most:,} bytes, starting with '1111"):
        reply_of(floods, tokens=tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sent) < 20 * MiB  # the rest was not even taken from the network
    assert peak < 16 * MiB
    text = b'"' + b"x" * (most - 2) + b'"'
    assert len(reply_of(sends(http_reply(text)), tokens=tokens)) == most - 2
    with pytest.raises(BadReplyError, match="more than"):
        reply_of(sends(http_reply(text + b" ")), tokens=tokens)


def test_how_long_a_server_tells_us_to_wait() -> None:
    for text, wait_s in {"7": 7.0, "": 0.0, "soon": 0.0, "-1": 0.0, "\u00b2": 0.0}.items():
        data = http_reply(b"", "503 No").replace(b"\r\n\r\n", b"\r\nretry-after: %s\r\n\r\n")
        with pytest.raises(NoReplyError) as error:
            reply_of(sends(data.replace(b"%s", text.encode("latin-1"))))
        assert (error.value.wait_s, error.value.status) == (wait_s, 503)


@pytest.mark.fault("secrets")
@pytest.mark.parametrize("token", ["", "abc"])
def test_a_token_is_sent_and_told_to_nobody(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[bytes] = []

    def records(connection: socket.socket) -> None:
        heads.append(connection.recv(2**16).lower())
        connection.sendall(http_reply(b"who are you?", "401 No"))

    monkeypatch.setenv("KDRL_TEST_TOKEN", token)
    state = "another one is set" if token else "it is not set"
    message = rf"status 401: who are you\?; set the .* KDRL_TEST_TOKEN to its token, {state}"
    with talking(records, reads=False) as url:
        exchange = Exchange(url + "/v1/", "engine.url", "KDRL_TEST_TOKEN")
        with closing(exchange), pytest.raises(BadReplyError, match=message) as error:
            exchange.start(exchange.json("GET", "/x", None, 5.0)).result()
        assert exchange.url == url
    assert "abc" not in str(error.value)
    assert (b"authorization: bearer abc\r\n" in heads[0]) == bool(token)
    assert (b"authorization" in heads[0]) == bool(token)
    assert b"accept-encoding: identity\r\n" in heads[0]


@pytest.mark.fault("secrets")
@pytest.mark.parametrize(
    "url", ["http://me:pass@host:1", "http://pass@host", "http://host/?key=pass", "http://h#pass"]
)
def test_a_password_in_a_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"engine\.url must be .* variable NAME$") as error:
        Exchange(url, "engine.url", "NAME")
    assert "pass" not in str(error.value).replace("password", "")


@pytest.mark.fault("secrets")
@pytest.mark.parametrize("token", ["secret\n", "se cret", "secr\u00e9t", "secret\t"])
def test_a_token_that_no_header_can_hold_is_refused(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAME", token)
    with pytest.raises(ValueError, match="variable NAME must be a token of printable") as error:
        Exchange("http://host:1", "engine.url", "NAME")
    assert "secr" not in str(error.value)


def test_parts_of_a_reply_have_exactly_the_type_that_they_must_have() -> None:
    reply = {"a": 1, "b": [2], "c": [], "d": True, "e": None}
    assert member(reply, "a", int) == 1
    assert member(reply, "e", int, type(None)) is None
    assert only(reply, "b") == 2
    for wrong in (
        lambda: member(reply, "d", int),
        lambda: member(reply, "e", int),
        lambda: member([reply], "a", int),
        lambda: member(reply, "z", int),
        lambda: only(reply, "a"),
        lambda: only(reply, "c"),
        lambda: typed(1.0, "count", int),
        lambda: typed([[[[[[[[[1]]]]]]]]] * 99, "count", int),
    ):
        with pytest.raises(BadReplyError) as error:
            wrong()
        assert len(str(error.value)) < 300
