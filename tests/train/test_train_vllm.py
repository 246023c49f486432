"""train on a scripted vLLM server: restarts and signals in the middle of a run."""

import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from rich.console import Console

from kdrl_train import train
from kdrl_train.config import EngineConfig, TrainConfig
from kdrl_train.errors import EngineError
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.log import read_records
from tests.train.rollouts.scripted_vllm import Scripted
from tests.train.servers import running, status

pytestmark = pytest.mark.slow
COMPLETIONS = 16  # of a step


def run(
    config: Callable[..., TrainConfig], server: Scripted, **engine: Any
) -> tuple[Path, str, list[dict[str, Any]]]:
    """Train three steps; returns the run folder, the console's text and the events."""
    text = io.StringIO()
    with running(server.app()) as url:
        # the completions are the test's own, so the policy's log-probabilities are others
        sampler = EngineConfig(kind="vllm_server", url=url, max_sampler_mismatch=100.0, **engine)
        out = train.main(config(engine=sampler), Console(file=text, width=300))
    return out, text.getvalue(), jsonl.read(out / "events.jsonl")


@pytest.mark.fault("sick vLLM server")
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_goes_on_over_a_restart(config: Callable[..., TrainConfig], staleness: Any) -> None:
    server = Scripted()
    labels: list[str | None] = []

    def restarts_once(body: dict[str, Any]) -> Any:
        if len(server.bodies) == COMPLETIONS + 4:
            server.state["label"] = None
        labels.append(server.state["label"])
        return server.complete(body)

    server.busy = restarts_once
    out, text, events = run(config, server, staleness=staleness)
    message = f"was restarted: it has got the weights after {1 - staleness} steps again"
    assert [row["step"] for row in read_records(out)] == [0, 1, 2]
    assert [message in event["message"] for event in events if event["event"] == "engine"] == [True]
    assert message in " ".join(text.split())
    assert len(labels) == 4 * COMPLETIONS  # those of the second step twice
    assert None not in labels[2 * COMPLETIONS :]
    assert not list(out.glob("*.safetensors"))


@pytest.mark.fault("sick vLLM server")
@pytest.mark.parametrize("reply", ["<html>", "[" * 100_000, '{"choices": [{"token_ids": [null]}]}'])
def test_a_sick_reply_loses_no_finished_step(
    config: Callable[..., TrainConfig], tmp_path: Path, reply: str
) -> None:
    server = Scripted()

    def sick_from_the_second_step(body: dict[str, Any]) -> Any:
        sick = len(server.bodies) >= COMPLETIONS
        return status(200, reply) if sick else server.complete(body)

    server.busy = sick_from_the_second_step
    with pytest.raises(EngineError, match=r"the server at http://127\.0\.0\.1:\d+ must re"):
        run(config, server)
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.fault("stopped by a signal")
@pytest.mark.parametrize(
    ("path", "done"), [("/v1/completions", 1), ("/collective_rpc", 0), ("/reset_prefix_cache", 1)]
)
def test_a_signal_does_not_wait_for_a_server_that_hangs(
    config: Callable[..., TrainConfig], path: str, done: int
) -> None:
    server = Scripted()
    times: list[float] = []

    def stop() -> None:
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    def hangs_after_the_first_step(body: dict[str, Any]) -> Any:
        if len(server.bodies) == COMPLETIONS - 1:
            server.hangs = path
        return server.complete(body)

    server.busy = hangs_after_the_first_step
    server.on_hang = stop
    saved = train.stopped

    def releases(*arguments: Any) -> bool:
        times.append(time.monotonic())
        server.release.set()  # or the server's thread would not end
        return saved(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "stopped", releases)
        out, text, _ = run(config, server)
    assert times[1] - times[0] < 3.0  # with a checkpoint, on a busy machine
    assert f"stopped by a signal (SIGTERM) after {done} steps" in text
    assert (out / "checkpoints" / f"step_{done:06d}").is_dir() == bool(done)
