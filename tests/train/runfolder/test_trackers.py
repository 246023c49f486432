"""Trackers get each step once, in one run, also after a kill; unused ones are not imported."""

import io
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdrl_train import train
from kdrl_train.config import LogConfig, SamplingConfig, TrainConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.runfolder.log import read_records
from kdrl_train.runfolder.trackers import Trackers
from kdrl_train.start import open_run, preflight

SERVICES = ("wandb", "trackio")


@pytest.fixture
def config(config: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """config(*trackers): a run of 3 short steps."""
    sampling = SamplingConfig(prompts_per_step=2, group_size=2, max_new_tokens=3)
    return lambda *trackers: config(
        sampling=sampling, method=PRESETS["grpo"], log=LogConfig(trackers=trackers)
    )


def follow(trackers: tuple[str, ...], folder: Path, first: int, last: int, value: float) -> None:
    """Send the records of steps first, ..., last from one process."""
    folder.mkdir(exist_ok=True)
    with Trackers(LogConfig(trackers=trackers)) as opened:
        opened.start({"seed": 1, "model": {"policy": "x"}}, folder, first)
        for step in range(first, last + 1):
            opened.log({"step": step, "reward": value + step, "kl_teacher": None})


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def test_tensorboard_holds_each_step_once(tmp_path: Path) -> None:
    follow(("tensorboard",), tmp_path, 0, 3, value=0.5)
    follow(("tensorboard",), tmp_path, 2, 4, value=100.5)  # the checkpoint was that of 2 steps
    written = events(tmp_path)
    curve = [(event.step, event.value) for event in written.Scalars("reward")]
    assert curve == [(0, 0.5), (1, 1.5), (2, 102.5), (3, 103.5), (4, 104.5)]
    assert written.Tags()["scalars"] == ["reward"]
    text = written.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "seed: 1\nmodel:\n  policy: x\n" in text


def test_a_run_and_its_resumption_are_one_curve(config: Callable[..., TrainConfig]) -> None:
    settings = config("tensorboard")
    quiet = Console(file=io.StringIO())
    train.main(replace(settings, steps=1), quiet)
    folder = train.main(replace(settings, resume=True), quiet)
    records, written = read_records(folder), events(folder)
    assert [record["step"] for record in records] == [0, 1, 2]
    for name in ("loss", "entropy", "seconds_update"):
        curve = [(event.step, event.value) for event in written.Scalars(name)]
        expected = [(record["step"], pytest.approx(record[name])) for record in records]
        assert curve == expected, name


class FakeService:
    """Stands for the modules wandb and trackio, and keeps what they get, in order."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.records: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **settings: Any) -> SimpleNamespace:
        self.runs.append(settings)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, record: dict[str, float], step: int) -> None:
        self.records.append((step, record))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_gets_each_step_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = FakeService()
    monkeypatch.setitem(sys.modules, name, service)
    follow((name,), tmp_path / "run", 0, 3, value=0.5)
    follow((name,), tmp_path / "run", 2, 4, value=0.5)
    follow((name,), tmp_path / "other", 0, 0, value=9.5)
    expected = [(i, {"reward": i + 0.5}) for i in range(5)] + [(0, {"reward": 9.5})]
    assert service.records == expected
    assert service.finished == 3
    first, second, other = service.runs
    assert first == second
    assert (first["project"], first["resume"]) == ("kdrl", "allow")
    assert first["config"] == {"seed": 1, "model": {"policy": "x"}}
    assert first["name"].startswith("run-")
    assert other["name"].startswith("other-")
    assert first.get("id") == (first["name"].removeprefix("run-") if name == "wandb" else None)


@pytest.mark.parametrize("name", ["tensorboard", *SERVICES])
def test_a_missing_package_stops_the_run_at_once(
    config: Callable[..., TrainConfig], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    message = rf"log\.trackers must name packages.*got {name}: .*install 'kdrl-kernels\[{name}\]'"
    monkeypatch.setattr(open_run, "load", None)  # nothing is loaded before
    with pytest.raises(ValueError, match=message):
        train.main(config(name))
    assert not config().out.exists()


class WandbError(Exception):
    """Stands for wandb's own errors, which derive from no other."""


def refuse(**_: Any) -> None:
    raise WandbError("No API key configured")


@pytest.mark.parametrize("where", ["login", "init"])
def test_a_service_that_does_not_know_its_user_leaves_no_folder(
    config: Callable[..., TrainConfig],
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service: Any = FakeService()
    service.login = lambda: None
    setattr(service, where, refuse)
    monkeypatch.setitem(sys.modules, "wandb", service)
    message = "log.trackers must name trackers that can start, got wandb: WandbError: No API key "
    message += "configured: log in with `wandb login`, or set WANDB_MODE=offline,"
    settings = config("tensorboard", "wandb")
    if where == "login":
        monkeypatch.setattr(open_run, "load", None)  # nothing is loaded before
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        train.main(settings, Console(file=io.StringIO()))
    assert not settings.out.exists()
    settings.out.mkdir()  # a folder that was there stays, and is not a used one
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        train.main(settings, Console(file=io.StringIO()))
    assert {path.name for path in settings.out.iterdir()} <= {"tensorboard"}
    monkeypatch.undo()
    train.main(replace(settings, steps=1, log=LogConfig()), Console(file=io.StringIO()))


def test_check_names_a_service_that_does_not_know_its_user(
    config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    service: Any = FakeService()
    service.login = refuse
    monkeypatch.setitem(sys.modules, "wandb", service)
    assert preflight.main(config("wandb")) == 1
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "trackers failed log.trackers must name trackers that can start, got wandb" in out
    service.login = lambda: None
    assert preflight.main(config("wandb")) == 0
    assert service.runs == []


def test_a_package_that_breaks_at_import_is_named(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wandb.py").write_text("raise TypeError('Descriptors cannot be created')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match=r"got wandb: Descriptors cannot be created; pip install"):
        train.main(config("wandb"))
    assert not config().out.exists()


def test_a_failed_run_closes_its_trackers(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = FakeService()
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setattr(train, "learn", None)
    with pytest.raises(TypeError, match="not callable"):
        train.main(config("wandb"), Console(file=io.StringIO()))
    assert service.finished == 1
    broken = replace(config("wandb").model, policy="")
    with pytest.raises(ValueError, match=r"model\.policy must name"):  # before a run was opened
        train.main(replace(config("wandb"), model=broken, out=config().out / "b"))
    assert (len(service.runs), service.finished) == (1, 1)


@pytest.mark.slow  # a process that loads everything else
def test_unused_trackers_are_not_imported() -> None:
    code = "import sys, kdrl_train.train; from kdrl_train import config\n"
    code += "from kdrl_train.runfolder import trackers\n"
    code += "trackers.Trackers(config.LogConfig())\n"
    code += "print({'tensorboard', 'wandb', 'trackio'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
