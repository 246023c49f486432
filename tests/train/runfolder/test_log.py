"""The log's files hold what they should, after a clean end and after a kill."""

import io
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kdrl_train.output import guard
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder import log as logs
from kdrl_train.runfolder.log import RunLog, Stages, read_records
from tests.train.test_output import FullDisk, unread_pipe

RECORD = {
    "reward": 0.5,
    "accuracy": 0.25,
    "groups_with_signal": 1.0,
    "response_length": 12.3,
    "truncated": 0.0,
    "entropy": None,
    "kl_teacher": math.nan,
    "kd_coef": 2e-3,
    "loss": 0.1,
    "grad_norm": 1.5,
    "tokens_per_s": 100.0,
    "seconds": 2.0,
}


EVALUATION = {
    f"eval_{name}_at_k{bound}": value + off
    for name, value in (("avg", 0.5), ("pass", 0.75), ("maj", 0.625))
    for bound, off in (("", 0.0), ("_low", -0.0625), ("_high", 0.0625))
}


def log(folder: Path, first: int = 0, **console: Any) -> tuple[RunLog, io.StringIO]:
    out = io.StringIO()
    return RunLog(folder, first, 10, Console(file=out, **{"width": 80} | console)), out


def test_a_step_is_one_record_and_one_line(tmp_path: Path) -> None:
    run, out = log(tmp_path)
    run.step({"step": 3} | RECORD)
    run.step({"step": 4} | RECORD)
    records = read_records(tmp_path)
    assert records == [{"step": s} | RECORD | {"kl_teacher": None} for s in (3, 4)]
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step  4/10  reward 0.500  right 25.0%  signal 100%  tokens 12")
    assert "entropy -" in lines[0]


def test_a_sketched_head_is_named_on_the_line(tmp_path: Path) -> None:
    run, out = log(tmp_path)
    for noise in (0.0123, None):
        sketch = {"sketch_noise": noise, "sketch_entries": 14.6, "sketch_flat_share": 0.031}
        run.step({"step": 3} | RECORD | sketch)
    first, second = out.getvalue().splitlines()
    assert "  |g| 1.50  noise 1.23%  entries 15  flat 3%  tok/s 100" in first
    assert "  noise -  entries 15" in second


def test_several_teachers_are_told_apart_on_the_line(tmp_path: Path) -> None:
    run, out = log(tmp_path)
    of_each = {"kl_teacher/math": 0.25, "kl_teacher/code": None}
    equal = {"kd_coef/math": 0.002, "kd_coef/code": 0.002}
    run.step({"step": 0} | RECORD | of_each | equal)
    run.step({"step": 1} | RECORD | of_each | equal | {"kd_coef/code": 0.01})
    first, second = out.getvalue().splitlines()
    assert "KL math 0.2500  KL code -  loss" in first
    assert "KL math 0.2500  beta math 2.0e-03  KL code -  beta code 1.0e-02  loss" in second


def test_a_terminal_breaks_no_number(tmp_path: Path) -> None:
    record = (
        {"step": 9} | RECORD | EVALUATION | {"response_length": 12345.6, "tokens_per_s": 123456.7}
    )
    run, wide = log(tmp_path / "file")
    run.step(record)
    (whole,) = wide.getvalue().splitlines()
    shares = ["avg@k 50.0% (43.8-56.2)", "pass@k 75.0% (68.8-81.2)", "maj@k 62.5% (56.2-68.8)"]
    assert whole.endswith("  ".join(["", *shares]))
    run, narrow = log(tmp_path / "terminal", width=100, force_terminal=True, color_system=None)
    run.step(record)
    lines = narrow.getvalue().splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 100
    assert all(line.startswith(" " * len("step 10/10  ")) for line in lines[1:])
    assert "  ".join(line.strip() for line in lines) == whole


def test_every_set_has_its_score_on_the_line(tmp_path: Path) -> None:
    scores = {f"eval/aime/avg_at_k{end}": v for end, v in (("", 0.25), ("_low", 0), ("_high", 0.5))}
    run, out = log(tmp_path)
    run.step({"step": 3} | RECORD | EVALUATION | scores | {"eval/aime/length": 9.0})
    assert out.getvalue().endswith("  maj@k 62.5% (56.2-68.8)  aime 25.0% (0.0-50.0)\n")


def test_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean time between the ends of two steps, of the last 20 at most, times the steps left."""
    clock = {"now": 50.0}
    monkeypatch.setattr(logs.time, "monotonic", lambda: clock["now"])
    out = io.StringIO()
    run = RunLog(tmp_path, 3, 40, Console(file=out))
    for step, seconds in enumerate([60, 4, 8, *[10] * 19, 31], start=3):
        clock["now"] += seconds
        run.step({"step": step} | RECORD)
    left = [line.partition("  left ")[2] for line in out.getvalue().splitlines()]
    assert left[:3] == ["", "0:02:20", "0:03:24"]  # 35 steps of 4 s, then 34 of 6 s
    assert left[-2:] == ["0:02:28", "0:02:35"]  # 15 of (8 + 19 * 10) / 20 s, 14 of 221 / 20 s


def test_the_screen_shows_the_stages_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(logs.output, "begin", shown.append)
    for stages in (Stages(shown=True), Stages()):  # the second, of a thread, is silent
        for name in ("rollout", "verify", "teacher", "update"):
            with stages(name):
                pass
    assert shown == ["rollouts", "rewards", "learning"]


@pytest.mark.fault("killed")
def test_resuming_drops_the_records_after_the_checkpoint(tmp_path: Path) -> None:
    run, _ = log(tmp_path)
    for step in range(4):
        run.step({"step": step} | RECORD)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed in the middle of a line
    log(tmp_path, first=2)
    assert [record["step"] for record in read_records(tmp_path)] == [0, 1]


@pytest.mark.fault("killed")
def test_resuming_drops_the_samples_after_the_checkpoint(tmp_path: Path) -> None:
    run, _ = log(tmp_path)
    for step in range(3):
        run.samples(step, [{"step": step, "teacher_log_ratio": [0.5, math.nan]}])
    run.samples(3, [])
    log(tmp_path, first=2)
    kept = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in kept] == ["step_000000.jsonl", "step_000001.jsonl"]
    assert json.loads(kept[0].read_text("utf-8")) == {"step": 0, "teacher_log_ratio": [0.5, None]}


def test_a_postponed_record_waits_until_it_is_logged(tmp_path: Path) -> None:
    run, _ = log(tmp_path)
    run.step({"step": 0} | RECORD)
    run.postpone({"step": 1, "reward": 0.5})
    assert run.postponed(0) is None
    assert run.postponed(1) == {"step": 1, "reward": 0.5}
    again, _ = log(tmp_path, first=2)
    assert again.postponed(1) == {"step": 1, "reward": 0.5}
    again.step({"step": 1} | RECORD)
    assert again.postponed(1) is None
    assert log(tmp_path, first=2)[0].postponed(1) is None


def test_stages_add_up_and_measuring_costs_no_speed() -> None:
    stages = Stages()
    stages.seconds = {"rollout": 1.5, "update": 2.0, "eval": 4.0, "diagnostics": 1.0}
    stages.seconds |= {"sync": 0.25, "wait": 0.75}
    with stages("rollout"):
        pass
    assert stages.seconds["rollout"] > 1.5
    stages.seconds["rollout"] = 2.0
    assert stages.metrics(tokens=10) == {
        "tokens_per_s": 2.0,
        "tokens_per_s_rollout": 5.0,
        "tokens_per_s_update": 5.0,
        "seconds": 10.0,
        "seconds_rollout": 2.0,
        "seconds_update": 2.0,
        "seconds_sync": 0.25,
        "seconds_wait": 0.75,
        "seconds_eval": 4.0,
        "seconds_diagnostics": 1.0,
    }


def test_a_stage_is_timed_even_if_it_fails() -> None:
    stages = Stages()
    with pytest.raises(KeyError), stages("rollout"):
        raise KeyError
    assert stages.seconds["rollout"] > 0


def test_the_host_waits_for_a_gpu_at_the_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CUDA's events: the GPU ends its work 2 s after the host has queued it."""
    calls: list[str] = []

    class QueuedEvent:
        """A stand-in for torch.cuda.Event that knows when a slow GPU reaches it."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")
            self.at_s = 2.0 * (calls.count("record") // 2)

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: "QueuedEvent") -> float:
            return 1000 * (end.at_s - self.at_s)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", QueuedEvent)
    stages = Stages()
    for name in ("teacher", "update", "update"):
        with stages(name):
            pass
    with pytest.raises(KeyError), stages("sync"):
        raise KeyError
    assert (calls, stages.seconds) == (["record"] * 8, {})
    measured = stages.metrics(tokens=16)
    assert calls == ["record"] * 8 + ["wait"]
    assert (measured["seconds_teacher"], measured["seconds_update"]) == (2.0, 4.0)
    assert (measured["seconds_sync"], measured["tokens_per_s"]) == (2.0, 2.0)
    stages.settle()
    assert len(calls) == 9  # each counts once


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (unread_pipe, "[Errno 32] Broken pipe"),
        (FullDisk, "[Errno 28] No space left on device"),
    ],
    ids=["pipe", "disk"],
)
def test_a_run_outlives_its_console(
    tmp_path: Path, make: Callable[[], Any], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its console is a file of the caller's, or stdout; the loss is one event."""
    stream = make()
    for name, console in (("file", Console(file=stream)), ("stdout", None)):
        monkeypatch.setattr(sys, "stdout", guard(stream))
        run = RunLog(tmp_path / name, 0, 10, console)
        run.event("started", "steps 1 to 10")
        run.step({"step": 0} | RECORD)
        run.event("stopped", "after 1 step")
        events = jsonl.read(tmp_path / name / "events.jsonl")
        assert [event["event"] for event in events] == ["started", "console", "stopped"]
        assert events[1]["message"] == (
            f"the console cannot be written ({error}): the run goes on without it"
        )
        assert len(read_records(tmp_path / name)) == 1
    if make is unread_pipe:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what it still holds
        stream.close()
