"""Whatever ends a run, the steps that are done are saved, with their records."""

import io
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from kdrl_train import train
from kdrl_train.cli import exit_code
from kdrl_train.config import OptimConfig, SamplingConfig, TrainConfig
from kdrl_train.errors import BrokenWeightsError, RankError
from kdrl_train.method import grpo
from kdrl_train.method.presets import PRESETS
from kdrl_train.ranks import ALONE, World
from kdrl_train.rollouts.engines.generate import GenerateEngine
from kdrl_train.runfolder import checkpoint, jsonl
from kdrl_train.runfolder.events import recorded
from kdrl_train.runfolder.log import read_records
from kdrl_train.start.open_run import open_run
from kdrl_train.step import coefficients
from kdrl_train.step.run import Run
from tests.train.ranks import train_ranks
from tests.train.test_train import run as train_alone
from tests.train.test_train import without_times
from tests.train.test_two_ranks import assert_same_metrics

Config = Callable[..., TrainConfig]
ERRORS = (torch.OutOfMemoryError, RuntimeError, OSError, MemoryError, ValueError)
BEFORE = ("rollout", "reward", "scoring", "backward")
"""Places of a step before its first optimiser step: the step does not count."""
AFTER = ("samples", "engine push", "evaluation", "log", "checkpoint")

NOTHING_SAVED = "no step is saved: --resume starts again at step 1"


@pytest.fixture
def opened(config: Config) -> Iterator[Run]:
    """A run of two updates a step, without a teacher, that saves nothing by itself."""
    settings = config(
        steps=1000,
        save_every=1000,
        keep_checkpoints=1,
        model=replace(config().model, teacher=None),
        method=PRESETS["grpo"],
        sampling=SamplingConfig(prompts_per_step=2, group_size=2, max_new_tokens=3),
        optim=OptimConfig(learning_rate=1e-3, updates_per_rollout=2),
    )
    with ExitStack() as stack:
        yield open_run(settings, ALONE, stack, Console(file=io.StringIO()))[0]


def target(run: Run, place: str) -> tuple[Any, str]:
    """Return the owner and the name of the function that does what is to fail at a place."""
    return {
        "rollout": (run.engine, "generate"),
        "reward": (run.verifier, "score"),
        "scoring": (coefficients, "score"),
        "backward": (Tensor, "backward"),
        "optimiser": (run.optimizer, "step"),
        "samples": (run.log, "samples"),
        "engine push": (run.engine, "load"),
        "evaluation": (train, "evaluation"),
        "log": (jsonl, "append"),
        "checkpoint": (checkpoint, "save"),
    }[place]


def break_second_step(run: Run, place: str, error: Exception, torn: bool = False) -> None:
    """Run two steps of an opened run; the second one fails at a place, once.

    torn: after the step's first optimiser step has begun.
    """
    owner, name = target(run, place)
    failed: list[str] = []

    def fail(*arguments: Any, **more: Any) -> Any:
        if run.position.done >= due and run.position.begun == torn and not failed:
            failed.append(place)
            raise error
        return call(*arguments, **more)

    first = run.position.done
    due = first + (2 if place in AFTER else 1)
    if place == "checkpoint":
        run = replace(run, config=replace(run.config, save_every=2, steps=first + 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "is_evaluated", lambda *_: place == "evaluation" and not failed)
        patch.setattr(train, "evaluation", lambda _: {})
        call = getattr(owner, name)
        patch.setattr(owner, name, fail)
        with pytest.raises(type(error)) as raised, recorded(run.log, run.config, 1):
            train.steps(run, first)
    assert raised.value is error
    assert failed == [place]


def assert_kept(run: Run, done: int) -> None:
    """Check that the checkpoint and the records are those of `done` steps."""
    assert run.position.done == run.saver.saved == done
    assert checkpoint.latest(run.config.out / "checkpoints").step == done
    records = read_records(run.config.out)
    if len(records) < done:
        records.append(run.log.postponed(done - 1))
    assert [record["step"] for record in records] == list(range(done))


def break_everywhere(run: Run, faults: list[tuple[str, type[Exception]]]) -> None:
    for place, kind in faults:
        first, error = run.position.done, kind(f"the {place} failed")
        break_second_step(run, place, error)
        done = first + (2 if place in AFTER else 1)
        assert_kept(run, done)
        assert error.__notes__ == [f"steps 1 to {done} are saved: --resume continues there"]
        event = jsonl.read(run.config.out / "events.jsonl")[-1]
        assert event["message"] == f"{kind.__name__}: the {place} failed"
        assert event["notes"] == error.__notes__
        run.engine.load(run.policy, done)


def assert_resumes(run: Run) -> None:
    """Check that the run goes on as one that met no fault."""
    done = run.position.done
    settings = replace(run.config, steps=done + 1)
    resumed = train_alone(replace(settings, resume=True))
    whole = train_alone(replace(settings, out=settings.out.with_name("whole")))
    assert without_times(resumed) == without_times(whole)


@pytest.mark.fault("error in a step")
def test_an_error_before_or_after_the_update_costs_no_step(
    opened: Run, record_property: Callable[[str, object], None]
) -> None:
    faults = list(zip((*BEFORE, *AFTER), cycle(ERRORS)))
    break_everywhere(opened, faults)
    record_property("tried", len(faults))


@pytest.mark.fault("error in a step")
@pytest.mark.slow
def test_every_error_at_every_place(
    opened: Run, record_property: Callable[[str, object], None]
) -> None:
    faults = [(place, kind) for kind in ERRORS for place in (*BEFORE, *AFTER)]
    break_everywhere(opened, faults)
    assert_resumes(opened)
    record_property("tried", len(faults))


@pytest.mark.fault("error in a step")
def test_torn_weights_are_not_saved(
    opened: Run, record_property: Callable[[str, object], None]
) -> None:
    """An optimiser step that fails may have changed a part of the weights."""
    break_second_step(opened, "backward", ValueError("before"))
    rest = "the weights belong to no whole step and are not saved"
    newest = opened.config.out / "checkpoints" / "step_000001"
    for place, kind in zip(cycle(("optimiser", "backward")), ERRORS):
        error = kind("in the middle")
        break_second_step(opened, place, error, torn=True)
        assert error.__notes__ == [
            f"an optimiser step of step 3 had begun: {rest}; steps 1 to 1 are saved: --resume "
            "continues there"
        ]
        assert checkpoint.latest(newest.parent).folder == newest
        checkpoint.load(checkpoint.read(newest), model=opened.policy, optimizer=opened.optimizer)
        opened.position.done, opened.position.begun = 1, False
        log = opened.config.out / "metrics.jsonl"
        jsonl.write(log, jsonl.read(log)[:1])
        opened.engine.load(opened.policy, 1)
    assert_resumes(opened)
    record_property("tried", len(ERRORS))


@pytest.mark.fault("weights or gradient not finite")
def test_weights_that_cannot_sample_are_not_saved(opened: Run) -> None:
    """A checkpoint of them would be the newest, and a resume would meet the same error."""
    error = BrokenWeightsError("logits")
    break_second_step(opened, "rollout", error)
    note = f"the weights after step 1 are not saved; {NOTHING_SAVED}"
    assert error.__notes__ == [note]
    assert checkpoint.latest(opened.config.out / "checkpoints") is None


@pytest.mark.fault("error in a step")
def test_a_save_that_fails_hides_no_error(opened: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(checkpoint, "save", full)
    error = KeyError("first")
    break_second_step(opened, "rollout", error)
    assert error.__notes__ == ["then saving failed with OSError: no space", NOTHING_SAVED]
    screen = io.StringIO()

    def fail() -> int:
        error = OSError("no file")
        error.add_note("steps 1 to 5 are saved")
        raise error

    assert exit_code(fail, Console(file=screen, width=200)) == 1
    assert screen.getvalue() == "error: no file\nsteps 1 to 5 are saved\n"


def fail_on_rank(place: str, kind: type[Exception], failing: int, rank: int) -> None:
    """Make one rank fail in its second step, alone, while the others wait for it."""
    if rank != failing:
        return
    owner, name, count = {
        "backward": (Tensor, "backward", 2),  # one micro-batch a step
        "optimiser": (torch.optim.AdamW, "step", 2),
        "engine push": (GenerateEngine, "load", 3),  # the first is before step 0
    }[place]
    call, calls = getattr(owner, name), []

    def fail(*arguments: Any, **more: Any) -> Any:
        calls.append(0)
        if len(calls) == count:
            raise kind(f"the {place} failed")
        return call(*arguments, **more)

    setattr(owner, name, fail)


@pytest.mark.fault("error in a step")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "kind", "failing", "saved"),
    [
        ("backward", torch.OutOfMemoryError, 1, 1),
        ("optimiser", MemoryError, 0, None),
        ("engine push", KeyError, 1, 2),
    ],
)
def test_ranks_agree_on_what_is_saved(
    config: Config, place: str, kind: type[Exception], failing: int, saved: int | None
) -> None:
    """One rank fails while the other waits for it; both know why, and save what is whole."""
    settings = config(optim=OptimConfig(learning_rate=1e-3, micro_batch_tokens=1000))
    said = train_ranks(settings, 2, sabotage=partial(fail_on_rank, place, kind, failing))
    assert said[failing].splitlines()[-1] == f"{kind.__name__}: {kind(f'the {place} failed')}"
    cause = f"rank {failing} stopped with {kind.__name__}: {kind(f'the {place} failed')} ("
    assert f"RankError: {cause}" in said[1 - failing]
    event = jsonl.read(settings.out / "events.jsonl")[-1]
    assert event["event"] == "failed"
    assert event["message"].startswith(f"RankError: {cause}" if failing else f"{kind.__name__}: ")
    newest = checkpoint.latest(settings.out / "checkpoints")
    if saved is None:
        assert newest is None
        assert event["notes"][0].startswith("an optimiser step of step 2 had begun: ")
        return
    assert newest.step == saved
    assert event["notes"] == [f"steps 1 to {saved} are saved: --resume continues there"]
    resumed = train_alone(replace(settings, resume=True))
    assert_same_metrics(resumed, train_alone(replace(settings, out=settings.out / "whole")))


@pytest.mark.fault("full disk")
def test_a_batch_that_cannot_be_written_hides_nothing(
    opened: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What broke the step is said, though the disk is full."""
    advantages = grpo.advantages
    monkeypatch.setattr(grpo, "advantages", lambda *a: advantages(*a) * float("inf"))

    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed\nmore")

    monkeypatch.setattr(torch, "save", full)
    path = opened.config.out / "failed_step_000000.pt"
    with pytest.raises(FloatingPointError) as raised:
        train.steps(opened, 0)
    assert f"the batch cannot be written to {path}: PytorchStreamWriter failed. --resume would" in (
        str(raised.value)
    )


@pytest.mark.fault("stopped by a signal")
def test_an_error_as_a_stopped_run_saves_costs_no_step(
    opened: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is short in the save that a signal asked for: the ranks meet and save again."""
    whole_state, calls = checkpoint.whole_state, []

    def fail_once(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return whole_state(*arguments)

    monkeypatch.setattr(checkpoint, "whole_state", fail_once)
    monkeypatch.setattr(opened.log, "samples", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(torch.OutOfMemoryError, match=r"^out of memory") as raised:
        train.steps(opened, 0)
    assert raised.value.__notes__ == ["steps 1 to 1 are saved: --resume continues there"]
    assert checkpoint.latest(opened.config.out / "checkpoints").step == 1


@pytest.mark.fault("error in a step")
def test_the_step_that_is_torn_is_the_first_of_any_rank(opened: Run) -> None:
    class Apart(World):
        def share(self, _make: Callable[[], Any]) -> list[Any]:
            return [(2, False), (1, True)]

    opened.position.done = 2
    first = train.rescue(replace(opened, world=Apart()), KeyError("on rank 1"))
    assert first.__notes__[0].startswith("an optimiser step of step 2 had begun: ")


@pytest.mark.fault("stuck or lost rank")
def test_what_a_lost_rank_costs_is_said(opened: Run) -> None:
    class Alone:
        def hold(self, _error: Exception) -> tuple[Exception, bool]:
            return RankError("rank 1 must answer"), False

    opened.position.done = 5
    world: Any = replace(ALONE, meeting=Alone())
    first = train.rescue(replace(opened, world=world), RuntimeError("connection closed"))
    assert str(first) == "rank 1 must answer"
    assert first.__notes__ == [f"steps 1 to 5 cannot be saved without that rank; {NOTHING_SAVED}"]
    assert checkpoint.latest(opened.config.out / "checkpoints") is None
