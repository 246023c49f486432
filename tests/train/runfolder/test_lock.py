"""A run folder is of one run at a time, with locks and without them."""

import errno
import io
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from kdrl_train import train
from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.errors import RunError
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder import lock as locks
from kdrl_train.runfolder.checkpoint import writing
from kdrl_train.runfolder.export import export
from kdrl_train.runfolder.lock import RunLock
from kdrl_train.runfolder.log import RunLog, read_records
from tests.train.ranks import DEADLINE_S, Background
from tests.train.test_train import run, without_times

Config = Callable[..., TrainConfig]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every file system one without locks."""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)


@pytest.mark.fault("two runs in one folder")
def test_a_second_run_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with RunLock(folder) as first:
        holder = f"process {os.getpid()} on {socket.gethostname()} has held it since 20"
        with pytest.raises(RunError, match=f"got a second one while {holder}.*choose another"):
            RunLock(folder)
        first.require_ours()
    assert list(tmp_path.iterdir()) == []  # nothing was written: the folders go, too
    with RunLock(folder):
        (folder / "config.yaml").touch()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_resumed_run_waits_for_the_end_of_the_other(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    end = threading.Timer(0.3, first.__exit__)
    start = time.monotonic()
    end.start()
    with RunLock(tmp_path, wait_s=DEADLINE_S) as second:
        assert 0.3 <= time.monotonic() - start < 5  # polled every 0.2 s
        assert second.is_ours()
        with pytest.raises(RunError):  # it is locked, and not a file that `first` has removed
            RunLock(tmp_path)


@pytest.mark.fault("two runs in one folder")
@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_older_run_writes_nothing_more(tmp_path: Path) -> None:
    quiet = Console(file=io.StringIO())
    with RunLock(tmp_path) as first:
        assert "No locks available" in str(first.unsupported)
        first.claim()
        log = RunLog(tmp_path, 0, 9, quiet, lock=first)
        log.event("started", "")
        with RunLock(tmp_path) as refused:  # before its first write: the run at work goes on
            assert not refused.is_ours()
        log.require_ours()
        with RunLock(tmp_path) as second:
            second.claim()
            before = files(tmp_path)
            log.event("failed", "")
            record = {"step": 0}
            for write in (
                lambda: log.step(record),
                lambda: log.postpone(record),
                lambda: log.samples(0, [record]),
            ):
                with pytest.raises(RunError, match=r"got a second one: process \d+ .*stops here"):
                    write()
            assert files(tmp_path) == before
            second.require_ours()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.fault("two runs in one folder")
def test_a_checkpoint_of_the_other_run_is_left_alone(tmp_path: Path) -> None:
    """Both write the same step. What ends this run is no lack of space."""
    work = tmp_path / ".tmp_step_000007"
    work.mkdir()
    with pytest.raises(RunError, match=r"^run must be of one run"), writing(tmp_path, 7):
        raise RunError("run must be of one run at a time")
    assert work.exists()


@pytest.mark.fault("two runs in one folder")
@pytest.mark.usefixtures("no_locks")
@pytest.mark.slow
@pytest.mark.parametrize("where", ["learn", "finish"])
def test_a_run_whose_folder_was_taken_stops_and_publishes_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Another run begins in the middle of its second step, or at the end of it."""
    settings = config(steps=3, save_every=1)
    call, states = getattr(train, where), []
    with ExitStack() as others:

        def take(running: train.Run, step: int, *more: Any) -> Any:
            result = call(running, step, *more)
            if step == 1:
                others.enter_context(RunLock(settings.out)).claim()
                states.append(files(settings.out))
            return result

        monkeypatch.setattr(train, where, take)
        with pytest.raises(RunError, match="got a second one"):
            run(settings)
        assert files(settings.out) == states[0]
    steps = [int(path.name[5:]) for path in (settings.out / "checkpoints").glob("step_*")]
    assert steps == [1]


@pytest.mark.fault("two runs in one folder")
@pytest.mark.usefixtures("no_locks")
def test_a_model_is_not_exported_into_a_folder_that_was_taken(
    folders: dict[str, Path], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run begins while the files of the model are written."""
    model = AutoModelForCausalLM.from_pretrained(folders["student"])
    with RunLock(tmp_path) as first, RunLock(tmp_path) as second:
        first.claim()
        monkeypatch.setattr(tokenizer, "save_pretrained", lambda _: second.claim(), raising=False)
        with pytest.raises(RunError, match="got a second one"):
            export(model, tokenizer, tmp_path / "model", require_ours=first.require_ours)
    assert not (tmp_path / "model").exists()


@pytest.mark.fault("two runs in one folder")
def test_a_run_beside_a_live_one_changes_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(steps=1)
    run(settings)
    monkeypatch.setattr("kdrl_train.start.open_run.WAIT_S", 0.0)
    with RunLock(settings.out):
        before = files(settings.out)
        for resume in (True, False):
            with pytest.raises(RunError, match=f"process {os.getpid()} on"):
                run(replace(settings, resume=resume, steps=2))
        assert files(settings.out) == before


def launch(config: TrainConfig) -> None:
    """Start one rank, as torchrun does, and wait for its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    quiet = Console(file=io.StringIO())
    rank = get_context("fork").Process(target=train.main, args=(config, quiet))
    rank.start()
    rank.join()
    sys.exit(rank.exitcode)


@pytest.mark.fault("killed")
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_launcher_and_its_restart_write_each_step_once(config: Config) -> None:
    """The rank that is left behind saves and stops; the run that follows waits for it."""
    sampling = SamplingConfig(prompts_per_step=4, group_size=4, max_new_tokens=30)
    whole = config("whole", steps=8, sampling=sampling)
    parts = config("parts", steps=8, sampling=sampling)
    expected = without_times(run(whole))
    first = Background(launch, parts)
    deadline = time.monotonic() + DEADLINE_S
    while len(read_records(parts.out)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text(encoding="utf-8")
    first.kill()
    (rank,) = (Path(f"/proc/{pid}") for pid in children.split())
    assert rank.exists()  # it is left behind, and has the lock
    second = Background(launch, replace(parts, resume=True))
    while second.exit_code is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert second.exit_code == 0
    assert not rank.exists()
    prompt, *events = jsonl.read(parts.out / "events.jsonl")
    assert prompt["event"] == "prompt"
    assert [event["event"] for event in events] == ["started", "stopped", "resumed", "finished"]
    assert "stopped by a signal (torchrun is gone) after" in events[1]["message"]
    assert events[2]["dropped"] == 0
    assert without_times(read_records(parts.out)) == expected
