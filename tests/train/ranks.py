"""Starts processes that train quickly: they are forked from one that has imported the trainer.

It is a process of its own, so that nothing is forked from pytest's, which has threads. It does
once what costs each of them seconds otherwise: it loads a model, and starts the fork server of the
verifiers.
"""

import atexit
import gc
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import transformers
from pebble.common import CONSTS
from rich.console import Console

from kdrl_train import train
from kdrl_train.config import RewardConfig, TrainConfig
from kdrl_train.ranks import World, connect
from kdrl_train.rollouts.verifier import Verifier
from tests.train.conftest import LOOKS_S

DEADLINE_S = 120.0


def train_ranks(
    config: TrainConfig, ranks: int, sabotage: Callable[[int], None] | None = None
) -> list[str]:
    """Run train.main on every rank and return what each printed.

    An error is in the last line, as "Type: message".

    sabotage: a function of a module, which is called with the rank on each rank before the run.
    """
    return on_processes(ranks, partial(_train, config, sabotage))


def torchrun(ranks: int, *arguments: str, timeout_s: float = 300) -> str:
    """Start a module (`-m NAME OPTIONS`) on so many ranks; return what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def on_ranks(ranks: int, call: Callable[[World], Any], tensor: int = 1) -> list[Any]:
    """Call call(world) on every rank and return its results, or the errors it raised.

    tensor: world.tensor.
    """
    return on_processes(ranks, partial(_connected, call, tensor))


def on_processes(
    ranks: int, call: Callable[[int], Any], deadline_s: float = DEADLINE_S
) -> list[Any]:
    """Call call(rank) in a process for each rank, without a process group; return the results."""
    results: list[Any] = _in_launcher(_on_processes, ranks, call, deadline_s)
    return results


class Background:
    """A forked process that calls a function of a module."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self.pid: int = _in_launcher(_start, target, arguments)

    @property
    def exit_code(self) -> int | None:
        """The exit code, or None while it runs."""
        code: int | None = _in_launcher(_exit_code, self.pid)
        return code

    def kill(self) -> None:
        """Send SIGKILL, and wait until the process is gone."""
        os.kill(self.pid, signal.SIGKILL)
        while self.exit_code is None:
            pass


@cache
def _launcher() -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()
    atexit.register(process.kill)
    return ours


def _in_launcher(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call call(*arguments) in the launcher and return its result, or raise its AssertionError."""
    _launcher().send((call, arguments))
    result = _launcher().recv()
    if isinstance(result, AssertionError):
        raise result
    return result


# in the launcher

_fork = multiprocessing.get_context("fork")
_started: dict[int, Any] = {}


def _serve(connection: Connection) -> None:
    _warm_up()
    while True:
        call, arguments = connection.recv()
        try:
            connection.send(call(*arguments))
        except AssertionError as error:
            connection.send(error)


def _warm_up() -> None:
    """Import and build what the forked processes share with this one: models, a fork server."""
    transformers.logging.disable_progress_bar()
    CONSTS.sleep_unit = LOOKS_S
    tiny = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    for family in ("qwen2", "llama"):
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
        config = transformers.AutoConfig.for_model(family, **tiny, **heads)
        with tempfile.TemporaryDirectory() as folder:
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            transformers.AutoModelForCausalLM.from_pretrained(folder)
    Verifier(RewardConfig(workers=1)).close()  # starts the fork server
    # the fork server is no child of the forked processes, so these can neither check nor restart it
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]


def _start(target: Callable[..., None], arguments: tuple[Any, ...]) -> int:
    process = _fork.Process(target=target, args=arguments)
    process.start()
    assert process.pid is not None
    _started[process.pid] = process
    return process.pid


def _exit_code(pid: int) -> int | None:
    code: int | None = _started[pid].exitcode
    return code


def _on_processes(ranks: int, call: Callable[[int], Any], deadline_s: float) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [_fork.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        _fork.Process(target=_run_rank, args=(rank, ranks, port, call, sender))
        for rank, (_, sender) in enumerate(pipes)
    ]
    gc.freeze()  # the ranks do not search what is imported, at each collection, for garbage
    try:
        results = []
        for process in processes:
            process.start()
        for process, (receiver, _) in zip(processes, pipes, strict=True):
            ready = wait([receiver, process.sentinel], deadline_s)
            assert ready, f"no result in {deadline_s:.0f} s"
            assert receiver in ready, f"no result, but exit code {process.exitcode}"
            results.append(receiver.recv())
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


# in the forked processes


def _run_rank(
    rank: int, ranks: int, port: int, call: Callable[[int], Any], sender: Connection
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sender.send(call(rank))


def _train(config: TrainConfig, sabotage: Callable[[int], None] | None, rank: int) -> str:
    out = io.StringIO()
    try:
        if sabotage is not None:
            sabotage(rank)
        train.main(config, Console(file=out, width=10_000))
    except Exception as error:
        out.write(f"{type(error).__name__}: {error}")
    return out.getvalue()


def _connected(call: Callable[[World], Any], tensor: int, _rank: int) -> Any:
    try:
        with connect(torch.device("cpu"), tensor=tensor) as world:
            return call(world)
    except Exception as error:
        return error
