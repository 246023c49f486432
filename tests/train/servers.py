"""Starts teachers' servers for tests: in a thread, in a process, and scripted ones."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastapi
import httpx2
import uvicorn
from fastapi.responses import JSONResponse, PlainTextResponse

from kdrl_train.config import ModelConfig
from kdrl_train.tools.serve import command
from kdrl_train.tools.serve.app import make
from kdrl_train.tools.serve.command import ServeConfig

START_S = 180.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class QuickServer(uvicorn.Server):
    """A server that looks each 10 ms whether it is to end, not each 100."""

    async def main_loop(self) -> None:
        """Serve until it is to end."""
        while not await self.on_tick(0):
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def running(app: Any, port: int | None = None) -> Iterator[str]:
    """Run an application in a thread, on a free port unless one is named; yields its URL."""
    port = port or free_port()
    config = uvicorn.Config(app, port=port, log_level="error")
    with started(QuickServer(config)):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def started(server: uvicorn.Server) -> Iterator[None]:
    """Run a server in a thread."""
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + START_S
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join()


def service(folder: Path, **config: Any) -> command.ServedTeacher:
    """Load a model as the server does."""
    served = command.ServedTeacher()
    model = ModelConfig(teacher=str(folder), device="cpu")
    command.load(ServeConfig(model=model, **config), served)
    return served


def teacher_app(folder: Path, **config: Any) -> fastapi.FastAPI:
    """Make the real application on the model of a folder."""
    return make(service(folder, **config))


class Process:
    """Runs `python -m kdrl_train serve` in a process that a test can kill."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        options = {"model.teacher": folder, "model.device": "cpu", "port": self.port}
        options |= {"batch-tokens": 256} | more
        self.command = [sys.executable, "-m", "kdrl_train", "serve"]
        self.command += [str(part) for k, v in options.items() for part in (f"--{k}", v)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(self.command, env=environment)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait_until_ready(self) -> list[str]:
        """Wait for the server, and return the statuses that /health gave on the way."""
        seen = []
        deadline = time.monotonic() + START_S
        with httpx2.Client(timeout=5) as client:  # to make one costs more than a query
            while not seen or seen[-1] != "ready":
                assert self.process.poll() is None
                assert time.monotonic() < deadline
                with contextlib.suppress(httpx2.TransportError):
                    seen.append(client.get(f"{self.url}/health").json()["status"])
                time.sleep(0.05)
        return seen

    def kill(self) -> None:
        """Kill the process by SIGKILL."""
        self.process.kill()
        self.process.wait()


class Scripted:
    """A server that replies as a test says, and records its queries.

    score(ids, prompt_tokens) returns the log-probabilities, or a Response to send as it is.
    """

    def __init__(self, score: Callable[[list[int], int], Any], **info: Any) -> None:
        self.score = score
        self.info = {
            "model": "scripted",
            "window": 256,
            "vocab_size": 258,
            "dtype": "float32",
            "tokenizer": "?",
            "eos_ids": [0],
            "fingerprint": "one",
        } | info
        self.models: list[dict[str, Any]] = [{"id": "scripted", "max_model_len": 256}]
        self.text: Callable[[int], str | None] = lambda _token: None
        self.queries: Counter[tuple[int, ...]] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def app(self) -> fastapi.FastAPI:
        app = fastapi.FastAPI()
        app.get("/version")(lambda: JSONResponse(self.info))
        app.get("/v1/models")(lambda: JSONResponse({"data": self.models}))
        app.post("/score")(self.kdrl)
        app.post("/v1/completions")(self.openai)
        return app

    def kdrl(self, body: dict[str, Any]) -> Any:
        (sequence,) = body["sequences"]
        scores = self._scores(body, sequence["ids"], sequence["prompt_tokens"])
        if isinstance(scores, fastapi.Response):
            return scores
        return {"logprobs": [scores], "fingerprint": self.info["fingerprint"]}

    def openai(self, body: dict[str, Any]) -> Any:
        """Reply as vLLM does: null for the first token, then one mapping for each token."""
        ids = body["prompt"]
        scores = self._scores(body, ids, 1)
        if isinstance(scores, fastapi.Response):
            return scores
        entries = [
            {str(token): {"logprob": x, "rank": 1, "decoded_token": self.text(token)}}
            for token, x in zip(ids[1:], scores, strict=False)
        ]
        choice = {"index": 0, "text": "!", "prompt_logprobs": [None, *entries]}
        return {"model": body["model"], "choices": [choice]}

    def _scores(self, body: dict[str, Any], ids: list[int], prompt_tokens: int) -> Any:
        with self.lock:
            self.queries[tuple(ids)] += 1
            self.bodies.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self.score(ids, prompt_tokens)
        finally:
            with self.lock:
                self.at_once -= 1


def by_position(ids: list[int], prompt_tokens: int) -> list[float]:
    """Score each token of the completion by -(place in the sequence + id / 1000)."""
    return [-(t + token / 1000) for t, token in enumerate(ids) if t >= prompt_tokens]


def status(code: int, text: str = "", **headers: str) -> fastapi.Response:
    """Make a reply to send as it is."""
    return PlainTextResponse(text, code, {k.replace("_", "-"): v for k, v in headers.items()})


@contextlib.contextmanager
def talking(talk: Callable[[socket.socket], None], reads: bool = True) -> Iterator[str]:
    """Run talk(connection) for each connection, after its header was read; yields the URL.

    What `talk` sends to a client that has left is dropped.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if reads:
                connection.recv(2**16)
            talk(connection)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(2**16):
                pass  # closing earlier would throw away what the client has not read yet

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # the listener is closed
                return
            threads.append(threading.Thread(target=serve, args=(connection,)))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (acceptor, *threads):
            thread.join()


def http_reply(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """Write a whole reply, with the right length unless `headers` says another one."""
    named = {"content-length": str(len(body))} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in named.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body
