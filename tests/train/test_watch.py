"""A rank that is stuck is named, with its stack, and does not hold the others."""

import io
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from kdrl_train import output, train
from kdrl_train.config import TrainConfig
from kdrl_train.rollouts.engines.generate import GenerateEngine
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.signals import Interrupt
from kdrl_train.watch import RankReport, RanksConfig, Watch, behind, in_collective
from tests.train.ranks import DEADLINE_S, Background

pytestmark = pytest.mark.fault("stuck or lost rank")
LIMIT_S = 4.0  # more than a save takes on a machine at work


def report(rank: int, still_s: float, *, waits: bool = False, silent_s: float = 0.0) -> RankReport:
    return RankReport(rank=rank, place="step 1/2", still_s=still_s, waits=waits, silent_s=silent_s)


@pytest.mark.parametrize(
    ("reports", "ranks"),
    [
        ([report(0, 1), report(1, 2)], []),
        ([report(0, 50, waits=True), report(1, 2)], []),  # a long rollout of rank 1
        ([report(0, 50, waits=True), report(1, 11)], [1]),
        ([report(0, 50, waits=True), report(1, 6, silent_s=5)], [1]),
        ([report(0, 50, waits=True), report(1, 0, waits=True, silent_s=12)], [1]),
        ([report(0, 12), report(1, 2, silent_s=11)], [1]),  # what does not run comes first
        ([report(0, 12, waits=True), report(1, 11, waits=True)], [0, 1]),  # each for the other
        ([report(0, 12, waits=True), report(1, 9, waits=True)], []),
        ([report(0, 12), report(1, 11), report(2, 0)], [0, 1]),
    ],
)
def test_who_is_behind(reports: list[RankReport], ranks: list[int]) -> None:
    assert [one.rank for one in behind(reports, 10.0)] == ranks


def test_a_poll_a_count_and_a_stage_are_moves() -> None:
    calls: list[Callable[[], object]] = [
        Interrupt().poll,
        lambda: output.begin("learning"),
        lambda: output.count("another", 1, 2),
        lambda: output.heading("step 2/3"),
    ]
    for call in calls:
        before = output.moves()
        call()
        assert output.moves() == before + 1
    assert output.place() == "step 2/3: learning"
    output.heading("")
    output.begin("")


@pytest.mark.parametrize(
    ("files", "waits"),
    [
        (["torch/_ops.py", "torch/distributed/distributed_c10d.py"], True),
        # of an exported model, which each rank gathers
        (
            [
                "torch/_ops.py",
                "torch/_library/autograd.py",
                "torch/_ops.py",
                "torch/distributed/t.py",
            ],
            True,
        ),
        (["torch/_ops.py", "torch/_library/autograd.py", "kdrl_train/step/update.py"], False),
        (["torch/distributed/checkpoint/filesystem.py"], False),
    ],
)
def test_where_a_rank_waits_for_others(files: list[str], waits: bool) -> None:
    call: Callable[[], bool] = in_collective
    for file in files:  # from the innermost call on
        names: dict[str, Any] = {"call": call}
        exec(compile("def outer(call=call): return call()", f"/lib/{file}", "exec"), names)
        call = names["outer"]
    with pytest.MonkeyPatch.context() as patch:
        current = sys._current_frames
        ident = threading.main_thread().ident
        patch.setattr(sys, "_current_frames", lambda: {ident: current()[ident].f_back.f_back})
        assert call() == waits


def test_a_rank_that_never_reports_holds_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr("os._exit", lambda code: (codes.put(code), watch.close()))
    monkeypatch.setattr("kdrl_train.watch.GRACE_S", 0.1)
    config = RanksConfig(start_timeout_s=0.6)
    store, notes = dist.HashStore(), []
    other = Watch(2, 3, store, config, tmp_path)
    other.close()  # it is done, and is not waited for
    watch = Watch(0, 3, store, config, tmp_path)
    watch.note = lambda kind, message, **_: notes.append((kind, message))
    while codes.empty():
        output.move()  # this rank moves
    assert codes.get() == 1
    assert [kind for kind, _ in notes] == ["warning", "failed"]
    assert re.fullmatch(
        r"each rank must move within ranks.start_timeout_s = 0.6 s, got no move for 1 s from rank "
        r"1, last seen at start: its process does not run, or the network is gone. The run ends: "
        r"nothing was saved yet",
        notes[1][1],
    )
    assert store.get("verdict").decode() == notes[1][1]


def stuck_forever() -> None:
    time.sleep(1000)


def get_stuck(place: str, how: str) -> None:
    """Make this rank get stuck in its second step: of two micro-batches a step it is the third."""
    calls: list[int] = []

    def once(call: Callable[..., Any], count: int, *arguments: Any, **more: Any) -> Any:
        calls.append(0)
        if len(calls) == count:
            stuck_forever() if how == "sleep" else os.kill(os.getpid(), signal.SIGSTOP)
        return call(*arguments, **more)

    if place == "rollouts":
        generate = GenerateEngine.generate
        GenerateEngine.generate = lambda *a, **m: once(generate, 2, *a, **m)
    else:
        backward = torch.Tensor.backward
        torch.Tensor.backward = lambda *a, **m: once(backward, 3, *a, **m)


def train_rank(config: TrainConfig, rank: int, port: int, sabotage: tuple[int, str, str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = config.out.with_name(f"rank_{rank}.log")
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w")
    if rank == sabotage[0]:
        get_stuck(*sabotage[1:])
    train.main(config, Console(file=io.StringIO()))


@pytest.mark.slow  # two ranks, and a wait
@pytest.mark.parametrize(
    ("stuck", "place", "how"),
    [(1, "rollouts", "sleep"), (1, "learning", "sleep"), (0, "learning", "stop")],
)
def test_a_stuck_rank_is_named_and_ends_the_run(
    config: Callable[..., TrainConfig], stuck: int, place: str, how: str
) -> None:
    """A rank that sleeps ends itself; one that is stopped, here the one with the store, cannot."""
    settings = config(save_every=1, ranks=RanksConfig(step_timeout_s=LIMIT_S))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    until = time.monotonic() + DEADLINE_S
    ranks = [Background(train_rank, settings, rank, port, (stuck, place, how)) for rank in range(2)]
    ending = [0, 1] if how == "sleep" else [1 - stuck]
    try:
        while any(ranks[rank].exit_code is None for rank in ending) and time.monotonic() < until:
            time.sleep(0.1)
        assert [ranks[rank].exit_code for rank in ending] == [1] * len(ending)
    finally:
        for process in ranks:
            if process.exit_code is None:
                process.kill()
    trace = settings.out / f"stuck_rank_{stuck}.txt"
    where = rf"at step 2/3: {place}: its stack is in {trace}"
    if how == "stop":  # within a beat of its last report
        where = r"last seen at step \d/3: [a-z ]+: its process does not run"
    for rank in ending:
        words = settings.out.with_name(f"rank_{rank}.log").read_text(encoding="utf-8")
        must = f"rank {rank}: each rank must move within ranks.step_timeout_s = 4 s, got no move"
        assert must in words
        assert re.search(rf"no move for \d s from rank {stuck}, {where}", words), words
        assert f"from rank {1 - stuck}" not in words  # it waits
        assert "The run ends: --resume goes on from" in words
        assert "checkpoints/step_000001" in words
    if how == "sleep":
        assert "in stuck_forever" in trace.read_text(encoding="utf-8")
        events = jsonl.read(settings.out / "events.jsonl")
        for kind in ("warning", "failed"):  # a save may be slow, too, and warned of before
            messages = [event["message"] for event in events if event["event"] == kind]
            assert any("from rank 1, at step 2/3" in message for message in messages), kind
