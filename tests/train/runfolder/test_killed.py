"""A run that is killed, stopped or starved of its disk loses nothing that was saved."""

import io
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from rich.console import Console

from kdrl_train import train
from kdrl_train.config import EngineConfig, EvalConfig, OptimConfig, SamplingConfig, TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.errors import EngineError, RewardError, RunError
from kdrl_train.method.config import ScheduleConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.model.policy import Policy
from kdrl_train.runfolder import checkpoint, jsonl
from kdrl_train.runfolder.best import FILE, resolved
from kdrl_train.runfolder.log import read_records
from kdrl_train.step import update
from kdrl_train.tools import replay
from tests.train.full_disk import full_disk
from tests.train.ranks import DEADLINE_S, Background
from tests.train.test_train import run, weights, without_times

Config = Callable[..., TrainConfig]


def train_quietly(config: TrainConfig, threads: int) -> None:
    torch.set_num_threads(threads)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a killed run has nothing to say
    train.main(config, Console(file=io.StringIO()))


IN_THREADS = {"engine": EngineConfig(staleness=1), "save_async": True}


@pytest.mark.fault("killed")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "count"),
    [
        pytest.param({}, 10, id="10"),
        pytest.param(IN_THREADS, 4, id="threads"),
    ],
)
def test_killed_at_random_moments_it_equals_the_uninterrupted_run(
    config: Config, fields: dict[str, Any], count: int
) -> None:
    whole = config("whole", steps=12, save_every=1, **fields)
    parts = config("parts", steps=12, save_every=1, **fields)
    start = time.monotonic()
    expected = run(whole)
    length = time.monotonic() - start
    moments = random.Random(0)
    kills = inside_a_save = 0
    while kills < count:
        resume = (parts.out / "config.yaml").exists()
        process = Background(train_quietly, replace(parts, resume=resume), torch.get_num_threads())
        until = time.monotonic() + moments.uniform(0.1, length / 3)
        while time.monotonic() < until and process.exit_code is None:
            time.sleep(0.005)
        saving = moments.random() < 0.5  # half of the kills wait for a save
        while saving and process.exit_code is None and not _saving(parts):
            time.sleep(0.0005)
        if process.exit_code is not None:  # done already: begin again
            assert process.exit_code == 0
            _same(parts, expected, whole)
            parts = replace(parts, out=parts.out.with_name(f"parts-{kills}"))
            continue
        inside_a_save += _saving(parts)
        process.kill()
        kills += 1
    if (parts.out / "config.yaml").exists():
        parts = replace(parts, resume=True)
    run(parts)
    _same(parts, expected, whole)
    assert inside_a_save >= max(1, count // 6)


def _saving(config: TrainConfig) -> bool:
    return any((config.out / "checkpoints").glob(".tmp_step*"))


def _same(parts: TrainConfig, expected: list[dict[str, Any]], whole: TrainConfig) -> None:
    assert without_times(read_records(parts.out)) == without_times(expected)
    theirs = weights(whole.out / "model")
    for name, tensor in weights(parts.out / "model").items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.fault("stopped by a signal")
@pytest.mark.slow
def test_sigterm_saves_and_ends_with_0(config: Config) -> None:
    sampling = SamplingConfig(prompts_per_step=4, group_size=4, max_new_tokens=50)
    whole = config("whole", steps=6, sampling=sampling)
    parts = config("parts", steps=6, sampling=sampling)
    save_yaml(parts, parts.out.with_suffix(".yaml"))
    command = [sys.executable, "-m", "kdrl_train", "train", "--config"]
    command.append(str(parts.out.with_suffix(".yaml")))
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # for equal bits
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    deadline = time.monotonic() + DEADLINE_S
    while len(read_records(parts.out)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    requested = time.monotonic()
    process.send_signal(signal.SIGTERM)
    words, _ = process.communicate(timeout=30)
    assert process.returncode == 0, words
    assert time.monotonic() - requested < 10
    done = len(read_records(parts.out))
    assert 2 <= done < 6
    assert f"stopped by a signal (SIGTERM) after {done} steps: --resume continues" in words
    assert checkpoint.latest(parts.out / "checkpoints").step == done
    assert not (parts.out / "model").exists()
    assert without_times(run(replace(parts, resume=True))) == without_times(run(whole))


@pytest.mark.fault("stopped by a signal")
@pytest.mark.slow
def test_a_terminal_that_closes_stops_a_run_that_saves(config: Config) -> None:
    """It gets SIGHUP, and each write to the terminal fails with EIO."""
    sampling = SamplingConfig(prompts_per_step=4, group_size=4, max_new_tokens=50)
    settings = config(steps=200, save_every=1000, sampling=sampling)
    save_yaml(settings, settings.out.with_suffix(".yaml"))
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        command = [sys.executable, "-m", "kdrl_train", "train", "--config"]
        os.execv(command[0], [*command, str(settings.out.with_suffix(".yaml"))])
    deadline = time.monotonic() + DEADLINE_S
    while len(read_records(settings.out)) < 2 and time.monotonic() < deadline:
        os.read(terminal, 1000)  # it redraws its line of progress
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    done = len(read_records(settings.out))
    assert 2 <= done < 200
    assert checkpoint.latest(settings.out / "checkpoints").step == done
    *_, lost, last = jsonl.read(settings.out / "events.jsonl")
    assert (lost["event"], last["event"]) == ("console", "stopped")
    assert "Input/output error" in lost["message"]
    assert "stopped by a signal (SIGHUP)" in last["message"]


@pytest.mark.slow
@pytest.mark.fault("stopped by a signal")
@pytest.mark.parametrize(
    "number", [signal.SIGHUP, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_in_the_middle_of_a_step_drops_the_step(
    config: Config, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    whole, parts = config("whole"), config("parts")
    expected = run(whole)
    backward, calls = Policy.forward, []

    def stop_in_second_step(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 6:  # four or five micro-batches a step
            os.kill(os.getpid(), number)
        return backward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "forward", stop_in_second_step)
        records = run(parts)
    assert without_times(records) == without_times(expected[: len(records)])
    assert 0 < len(records) < 3
    assert checkpoint.latest(parts.out / "checkpoints").step == len(records)
    message = f"stopped by a signal ({number.name}) after {len(records)} steps: --resume continues"
    assert jsonl.read(parts.out / "events.jsonl")[-1]["message"] == message
    assert signal.getsignal(number) == before
    assert without_times(run(replace(parts, resume=True))) == without_times(expected)


@pytest.mark.slow
@pytest.mark.fault("stopped by a signal")
@pytest.mark.parametrize("where", ["generate", pytest.param("score", marks=pytest.mark.slow)])
def test_a_signal_in_an_evaluation_postpones_it(
    config: Config, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Twice: also the resumed run is stopped in it. What follows is that of an uninterrupted run,
    whose switch on a plateau waits for these scores."""
    switch = ScheduleConfig(kind="switch", initial=1.0, final=0.0, patience=1, min_gain=1.0)
    settings = {
        "eval": EvalConfig(data=config().data, every=1, samples=2, max_problems=3, keep_best=True),
        "method": replace(PRESETS["kdrl"], kd_coef=switch),
        "steps": 4,
    }
    whole, parts = config("whole", **settings), config("parts", **settings)
    expected = run(whole)
    calls = []

    def stop_second(call: Callable[..., Any]) -> Callable[..., Any]:
        def stopping(*arguments: Any, **more: Any) -> Any:
            calls.append(0)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return call(*arguments, **more)

        return stopping

    def stop_in_evaluation(evaluation: Callable[..., Any], run: train.Run) -> Any:
        owner = run.engine if where == "generate" else run.verifier
        with monkeypatch.context() as patch:
            patch.setattr(owner, where, stop_second(getattr(owner, where)), raising=False)
            return evaluation(run)

    for _ in range(2):
        calls[:] = calls[:1] and [0]  # the second evaluation of the run, the first of the resumed
        with monkeypatch.context() as patch:
            patch.setattr(train, "evaluation", partial(stop_in_evaluation, train.evaluation))
            records = run(replace(parts, resume=bool(calls)))
        assert without_times(records) == without_times(expected[:1])
        assert checkpoint.latest(parts.out / "checkpoints").step == 2
    assert without_times(run(replace(parts, resume=True))) == without_times(expected)
    assert {len(records) for records in (expected, read_records(parts.out))} == {4}
    best, same = (json.loads((one.out / FILE).read_text("utf-8")) for one in (whole, parts))
    assert best == same
    assert resolved(parts.out / FILE).is_dir()


@pytest.mark.fault("error in a step")
def test_an_error_in_an_evaluation_costs_no_step(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record waits for the resumed run, which may also do without the evaluation."""
    held_out = EvalConfig(data=config().data, every=2, samples=2, max_problems=3)
    whole, parts, without = (config(out, eval=held_out) for out in ("whole", "parts", "without"))
    expected = run(whole)

    def fail(_run: train.Run) -> Any:
        raise EngineError("the server is gone")

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluation", fail)
        with pytest.raises(EngineError, match="the server is gone"):
            run(parts)
    assert without_times(read_records(parts.out)) == without_times(expected[:1])
    assert checkpoint.latest(parts.out / "checkpoints").step == 2
    shutil.copytree(parts.out, without.out)
    records = run(replace(without, resume=True, eval=EvalConfig()))
    assert [record["loss"] for record in records] == [record["loss"] for record in expected]
    assert not any("eval_avg_at_k" in record for record in records)
    assert without_times(run(replace(parts, resume=True))) == without_times(expected)


@pytest.mark.slow
@pytest.mark.fault("killed")
def test_a_run_killed_before_its_first_checkpoint_starts_again(config: Config) -> None:
    settings = config(steps=2)
    settings.out.mkdir()
    save_yaml(settings, settings.out / "config.yaml")
    (settings.out / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    with pytest.raises(ValueError, match="pass --resume to continue that run"):
        run(settings)
    with pytest.raises(ValueError, match=r"(?s)keep the settings of .*run, got.*seed: 0 before, 1"):
        run(replace(settings, resume=True, seed=1))
    records = run(replace(settings, resume=True))
    assert without_times(records) == without_times(run(config("other", steps=2)))


@pytest.mark.slow
@pytest.mark.fault("full disk")
def test_a_full_disk_leaves_the_previous_checkpoint(config: Config) -> None:
    settings = config(steps=1)
    run(settings)
    more = replace(settings, steps=2, resume=True)
    message = r"the checkpoint of step 2 must be written to .*: free"
    with full_disk(20_000), pytest.raises(OSError, match=message):
        run(more)
    names = {path.name for path in (settings.out / "checkpoints").iterdir()}
    assert names == {"LATEST", "step_000001"}
    assert without_times(run(more)) == without_times(run(config("whole", steps=2)))


@pytest.mark.fault("full disk")
def test_a_folder_that_cannot_be_written_is_named(config: Config) -> None:
    settings = config(steps=1)
    run(settings)
    folder = settings.out / "checkpoints"
    more = replace(settings, steps=2, resume=True)
    kept = folder.rename(folder.with_name("kept"))
    folder.write_text("in the way")
    with pytest.raises(OSError, match=r"step 1 must be written to .*checkpoints, got FileExists"):
        run(replace(more, steps=1))
    folder.unlink()
    kept.rename(folder)
    assert checkpoint.latest(folder).step == 1


@pytest.mark.fault("flipped or cut file")
@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(
    config: Config, record_property: Callable[[str, int], None]
) -> None:
    settings = config(steps=2, save_every=1)
    run(settings)
    newest = settings.out / "checkpoints" / "step_000002"
    again = replace(settings, steps=3, resume=True)
    names = ("__0_0.distcp", ".metadata", "meta.json")
    for name, damage in product(names, ("cut", "gone")):
        path = newest / name
        whole = path.read_bytes()
        if damage == "cut":
            path.write_bytes(whole[:-100])
        else:
            path.unlink()
        with pytest.raises(ValueError, match="to resume from the previous") as error:
            run(again)
        assert "step_000002" in str(error.value), (name, damage)
        path.write_bytes(whole)
    shutil.rmtree(newest)
    assert [record["step"] for record in run(again)] == [0, 1, 2]
    record_property("tried", 2 * len(names))


def test_bits_that_rot_are_found(config: Config) -> None:
    settings = config(steps=1)
    run(settings)
    path = next((settings.out / "checkpoints" / "step_000001").glob("*.distcp"))
    path.write_bytes(bytes(path.stat().st_size))
    again = replace(settings, steps=2, resume=True)
    with pytest.raises(
        ValueError, match=r"__0_0.distcp must have the SHA-256 .*; delete .*_000001"
    ):
        run(again)
    with pytest.raises(
        ValueError,
        match=r"step_000001 must hold the state of this model, got \w+Error: .*: resume with",
    ):
        run(replace(again, checkpoint_hashes=False))


@pytest.mark.fault("killed")
def test_a_kill_between_pointer_and_rename_does_no_harm(config: Config) -> None:
    settings = config(steps=1)
    run(settings)
    (settings.out / "checkpoints" / "LATEST").rename(settings.out / "checkpoints" / ".tmp_LATEST")
    (settings.out / "checkpoints" / ".tmp_step_000000_old").mkdir()  # a kill while it was deleted
    run(replace(settings, resume=True))  # the run is done, so nothing is saved
    names = {path.name for path in (settings.out / "checkpoints").iterdir()}
    assert names == {"LATEST", "step_000001"}
    records = run(replace(settings, steps=2, resume=True))
    assert [record["step"] for record in records] == [0, 1]
    names = {path.name for path in (settings.out / "checkpoints").iterdir()}
    assert names == {"LATEST", "step_000001", "step_000002"}


@pytest.mark.fault("error in a step")
def test_steps_that_are_done_are_saved_whatever_ends_the_next(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a step has several updates; but not between two of them."""
    optim = OptimConfig(learning_rate=1e-3, updates_per_rollout=2)
    collect, take_step, taken = train.collect, update.take_step, []

    def fail(run: train.Run, step: int, stages: train.Stages) -> Any:
        if step == 2:
            raise RewardError("no reward")
        return collect(run, step, stages)

    with monkeypatch.context() as patch:
        patch.setattr(train, "collect", fail)
        with pytest.raises(ValueError, match="no reward"):
            run(config("first", optim=optim))
    assert checkpoint.latest(config("first").out / "checkpoints").step == 2

    def break_weights(optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int) -> float:
        taken.append(step)
        rate = take_step(optimizer, optim, step)
        if len(taken) == 3:  # of two updates a step
            with torch.no_grad():
                optimizer.param_groups[0]["params"][-1].fill_(torch.nan)
        return rate

    monkeypatch.setattr(update, "take_step", break_weights)
    with pytest.raises(RunError, match=r"must be finite.*\(update 2 of the step\)"):
        run(config("second", optim=optim))
    assert taken == [0, 0, 1]
    assert checkpoint.latest(config("second").out / "checkpoints") is None
    dump = config("second").out / "failed_step_000001.pt"
    with pytest.raises(ValueError, match="must be of the first update of its step, got update 2"):
        replay.main(replay.ReplayConfig(file=dump), Console(file=io.StringIO()))
