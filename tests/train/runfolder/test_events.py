"""A run notes in events.jsonl how it starts, resumes and ends."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdrl_train import train
from kdrl_train.config import TrainConfig
from kdrl_train.runfolder import events, jsonl
from kdrl_train.tools.report.runs import read
from tests.train.test_train import run


def noted(config: TrainConfig) -> list[dict[str, Any]]:
    """Read the events but for the prompt that a new run shows."""
    noted_events = jsonl.read(config.out / "events.jsonl")
    return [event for event in noted_events if event["event"] != "prompt"]


def kinds(config: TrainConfig) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in noted(config)]


@pytest.mark.slow
@pytest.mark.fault("killed")
def test_a_killed_run_and_its_resume(config: Callable[..., TrainConfig]) -> None:
    settings = config(steps=4, save_every=2, samples_per_step=1)
    run(replace(settings, steps=3))  # checkpoints at 2 and 3
    for name in ("config.yaml", "events.jsonl"):
        (settings.out / name).rename(settings.out / f"old-{name}")
    (settings.out / "old-config.yaml").rename(settings.out / "config.yaml")
    torn = (settings.out / "old-events.jsonl").read_text("utf-8").splitlines(keepends=True)
    (settings.out / "events.jsonl").write_text(
        torn[0] + torn[1] + '{"step": 3, "ev', encoding="utf-8"
    )
    for path in (settings.out / "checkpoints").glob("step_000003"):
        path.rename(settings.out / "gone")
    assert read(settings.out).status == "finished"  # of the 3 steps that it was to do
    run(replace(settings, steps=3, resume=True))
    written = noted(settings)
    assert [(e["event"], e["step"]) for e in written] == [
        ("started", 0),
        ("resumed", 2),
        ("finished", 3),
    ]
    assert [e.get("dropped") for e in written] == [0, 1, None]
    lost = "steps since the last checkpoint that are lost: 1"
    assert written[1]["message"] == f"{settings.out}: steps 3 to 3; {lost}"
    assert written[1]["ranks"] == 1
    assert {"python", "torch", "transformers"} <= set(written[1]["versions"])
    assert len(list((settings.out / "samples").iterdir())) == 3


def test_what_ends_a_run_is_noted(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(steps=3)
    finish = train.finish

    def fail(running: Any, step: int, *more: Any) -> None:
        if step == 1:
            raise KeyError("of anybody's code")
        finish(running, step, *more)

    monkeypatch.setattr(train, "finish", fail)
    with pytest.raises(KeyError):
        run(settings)
    assert kinds(settings) == [("started", 0), ("failed", 1)]
    assert noted(settings)[-1]["message"] == 'KeyError: "of anybody\'s code"'
    assert read(settings.out).status == "failed"


def test_a_run_that_is_done_says_so(config: Callable[..., TrainConfig]) -> None:
    settings = config(steps=2)
    run(settings)
    run(replace(settings, resume=True))
    out = settings.out
    done = f"all steps are done: the model is in {out / 'model'}"
    messages = [f"{out}: steps 1 to 2", done]
    messages += [f"{out}: 2 steps are done, of 2: a larger --steps goes on", done]
    assert [event["message"] for event in noted(settings)] == messages


def test_a_stop_is_noted(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(steps=3)
    finish = train.finish

    def request(running: Any, step: int, *more: Any) -> None:
        finish(running, step, *more)
        running.interrupt.requested = True

    monkeypatch.setattr(train, "finish", request)
    run(settings)
    assert kinds(settings) == [("started", 0), ("stopped", 1)]
    assert read(settings.out).status == "stopped"


class FullDisk:
    """A log that cannot note an end."""

    steps_done, dropped_records = 0, 0

    def event(self, kind: str, *_: Any, **__: Any) -> None:
        if kind == "failed":
            raise OSError("No space left on device")


@pytest.mark.fault("full disk")
def test_a_full_disk_does_not_hide_the_error(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ZeroDivisionError), events.recorded(FullDisk(), config(), 1):
        raise ZeroDivisionError


def test_versions_and_commit(tmp_path: Path) -> None:
    assert json.loads(json.dumps(events.versions()))["torch"]
    assert events._commit(tmp_path) is None
