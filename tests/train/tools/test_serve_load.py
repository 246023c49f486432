"""serve under load and attack: the figures of kdrl_train/tools/README.md.

pytest -n 0 -s -m slow tests/train/tools/test_serve_load.py
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import httpx2

from tests.train.servers import Process

PLAIN = {"content-type": "application/json"}
HEAD = b"POST /score HTTP/1.1\r\nhost: teacher\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[Process]:
    with Process(folders["teacher"], **{"batch-tokens": 2048}) as process:
        process.wait_until_ready()
        yield process


def megabytes(server: Process, field: str) -> float:
    """Reads VmRSS or VmHWM (the highest VmRSS) of the server."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 1024


def cpu_seconds(server: Process) -> float:
    """Reads the user and system time of the server, which other programs do not lengthen."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text(encoding="utf-8").split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def post_all(url: str, bodies: list[bytes], at_once: int) -> list[int]:
    """Sends requests, so many at a time, and returns their statuses."""

    async def go() -> list[int]:
        limits = httpx2.Limits(max_connections=at_once)
        timeout = httpx2.Timeout(60, pool=None)
        async with httpx2.AsyncClient(limits=limits, timeout=timeout) as client:

            async def post(body: bytes) -> int:
                reply = await client.post(f"{url}/score", content=body, headers=PLAIN)
                return reply.status_code

            return await asyncio.gather(*map(post, bodies))

    return asyncio.run(go())


PINGER = """
import http.client, select, sys, time
connection, slowest = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1])), 0.0
while not select.select([sys.stdin], [], [], 0.02)[0]:
    start = time.monotonic()
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"status":"ready"}'
    slowest = max(slowest, time.monotonic() - start)
print(slowest)
"""


@contextlib.contextmanager
def watched(server: Process, name: str) -> Iterator[None]:
    """Asks for /health all the time, and prints the slowest reply and the memory at the end.

    It asks in another process, which does not wait for the lock of this one.
    """
    command = [sys.executable, "-c", PINGER, str(server.port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as pinger:
        start, cpu, before = time.monotonic(), cpu_seconds(server), megabytes(server, "VmRSS")
        yield
        seconds, cpu = time.monotonic() - start, cpu_seconds(server) - cpu
        slowest = float(pinger.communicate("end")[0])
    after, highest = megabytes(server, "VmRSS"), megabytes(server, "VmHWM")
    print(
        f"\n{name}: {seconds:.1f} s, {cpu:.1f} s of CPU, slowest /health {1000 * slowest:.0f} ms, "
        f"memory {before:.0f} -> {after:.0f} MB (highest {highest:.0f})"
    )
    assert 0 < slowest < 5  # 30 s once; other programs lengthen it
    assert cpu < 20  # 30 s of one body once


def score_bodies(count: int) -> list[bytes]:
    """Makes requests of one sequence of 40 to 100 tokens each."""
    draw = random.Random(0)
    sequences = [
        {"ids": draw.choices(range(258), k=draw.randrange(40, 101)), "prompt_tokens": 20}
        for _ in range(count)
    ]
    return [json.dumps({"sequences": [sequence]}).encode() for sequence in sequences]


@pytest.mark.slow
def test_many_requests_are_all_answered(server: Process) -> None:
    with watched(server, "200 requests at once"):
        assert post_all(server.url, score_bodies(200), 200) == [200] * 200
    with watched(server, "2,000 requests, 64 at a time"):
        assert post_all(server.url, score_bodies(2000), 64) == [200] * 2000


@pytest.mark.slow
@pytest.mark.fault("attack on serve")
def test_slow_clients_delay_nobody(server: Process, record_property: Any) -> None:
    record_property("tried", 300)
    address = ("127.0.0.1", server.port)
    with contextlib.ExitStack() as stack:
        for i in range(300):
            client = stack.enter_context(socket.create_connection(address))
            client.sendall((b"", b"GET /", HEAD + b"content-length: 900\r\n\r\n{")[i % 3])
        with watched(server, "200 requests beside 300 slow clients"):
            assert post_all(server.url, score_bodies(200), 64) == [200] * 200


@pytest.mark.slow
@pytest.mark.fault("attack on serve")
def test_large_bodies_take_no_memory(server: Process, record_property: Any) -> None:
    """5 MB of empty sequences took 4.5 GB, and 30 s in which /health was silent."""
    attacks = {
        b'{"sequences": [' + b"{}," * 1_700_000 + b"{}]}": 422,
        b'{"sequences": [{"ids": [' + b"100000," * 1_000_000 + b"1]}]}": 422,
        b'{"sequences": [{"ids": [' + b"0," * 2_000_000 + b"1]}]}": 413,
        b" " * 30_000_000: 413,
    }
    record_property("tried", 20 * len(attacks))
    with watched(server, "20 times 4 large bodies at once"):
        statuses = post_all(server.url, list(attacks) * 20, 80)
    assert set(statuses) <= {413, 422, 503}
    assert set(attacks.values()) <= set(statuses)
    assert megabytes(server, "VmHWM") - megabytes(server, "VmRSS") < 600
    assert post_all(server.url, score_bodies(10), 1) == [200] * 10
