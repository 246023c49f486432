"""Sends the numbers of metrics.jsonl to TensorBoard, wandb or trackio as well.

metrics.jsonl is always written. A tracker is imported only if log.trackers names it. A resumed run
continues the same curve, in which each step is once. Only rank 0 of a run tracks.
"""

import importlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import yaml

from kdrl_train.config import LogConfig
from kdrl_train.errors import written
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.jsonl import Record


class Tracker(Protocol):
    """A service or library that records of metrics.jsonl are sent to."""

    def log_in(self) -> None:
        """Get ready to start, with nothing written."""

    def start(self, config: dict[str, Any], folder: Path, first_step: int) -> None:
        """Open the run of `folder`, or continue it; its next record is that of `first_step`."""

    def log(self, record: Record) -> None:
        """Send a record of metrics.jsonl, with its "step"."""

    def close(self) -> None:
        """End the tracking; called once, even if `start` was not."""


def numbers(record: Record) -> dict[str, float]:
    """Return the numbers of a record without its step, and without values that are None."""
    return {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}


class TensorBoard:
    """Writes event files into tensorboard/ of the run folder.

    A resumed run begins with an event that makes TensorBoard drop what a killed run wrote after its
    last checkpoint.
    """

    def __init__(self) -> None:
        self.module = importlib.import_module("torch.utils.tensorboard")
        self.writer: Any = None

    def log_in(self) -> None:
        """Do nothing: the files are on this machine."""

    def start(self, config: dict[str, Any], folder: Path, first_step: int) -> None:
        self.folder = folder / "tensorboard"
        self.writer = self.module.SummaryWriter(str(self.folder), purge_step=first_step)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self.writer.add_text("config", f"```yaml\n{text}```", first_step)

    def log(self, record: Record) -> None:
        with written(self.folder):
            for name, value in numbers(record).items():
                self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()  # a killed run loses no record

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class OnlineTracker:
    """Sends records to wandb or trackio, which have the same interface.

    They take records in the order of their steps and take none back. So a file <name>.json in the
    run folder holds the name of the run at the service and the next step to send: what a killed run
    sent after its last checkpoint is not sent again.
    """

    def __init__(self, name: str, project: str) -> None:
        module = importlib.import_module(name)
        self.init = module.init
        self.login = getattr(module, "login", None)  # trackio has none: a Space has its own token
        self.name = name
        self.project = project
        self.run: Any = None

    def log_in(self) -> None:
        """Have wandb read its key, or ask for it on a terminal; offline it needs none."""
        if self.login is not None:
            self.login()

    def start(self, config: dict[str, Any], folder: Path, first_step: int) -> None:
        self.path = folder / f"{self.name}.json"
        number = uuid4().hex[:8]
        self.state = {"id": number, "name": f"{folder.name}-{number}", "next_step": first_step}
        if self.path.exists():
            self.state = json.loads(self.path.read_text(encoding="utf-8"))
        identity = {"name": self.state["name"]}  # trackio knows a run by its name
        if self.name == "wandb":
            identity |= {"id": self.state["id"], "dir": str(folder)}
        self.run = self.init(project=self.project, config=config, resume="allow", **identity)
        self._write_state()

    def log(self, record: Record) -> None:
        if record["step"] >= self.state["next_step"]:
            self.state["next_step"] = record["step"] + 1
            self._write_state()  # before sending: a kill in between loses a record, repeats none
            self.run.log(numbers(record), step=record["step"])

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()

    def _write_state(self) -> None:
        """Write the file <name>.json."""
        jsonl.replace_text(self.path, json.dumps(self.state) + "\n")


class Trackers(AbstractContextManager["Trackers"]):
    """Sends records to all trackers of a run; leaving its block closes them.

    Args:
        config: names the trackers.
    Raises: ValueError for a tracker that cannot be imported; it names the command that installs it.
    """

    def __init__(self, config: LogConfig) -> None:
        self.trackers = {name: _make(name, config.project) for name in config.trackers}

    def log_in(self) -> None:
        """Make sure that every tracker knows its user. Raises: ValueError if one does not."""
        for name, tracker in self.trackers.items():
            with _blamed(name):
                tracker.log_in()

    def start(self, config: dict[str, Any], folder: Path, first_step: int) -> None:
        """Open or continue the run at every tracker.

        Args:
            config: the configuration as plain values, which config_file.to_dict returns.
            folder: the run folder, which exists.
            first_step: the step of the next record.
        Raises: ValueError for a tracker that does not start.
        """
        for name, tracker in self.trackers.items():
            with _blamed(name):
                tracker.start(config, folder, first_step)

    def log(self, record: Record) -> None:
        """Send a record of metrics.jsonl to every tracker."""
        for tracker in self.trackers.values():
            tracker.log(record)

    def close(self) -> None:
        """Close every tracker, once."""
        while self.trackers:
            self.trackers.popitem()[1].close()

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    """Turn the errors of a tracker into a ValueError that names it and what to do."""
    try:
        yield
    except Exception as error:  # services raise errors of their own, and those of their connection
        login = " log in with `wandb login`, or set WANDB_MODE=offline," if name == "wandb" else ""
        raise ValueError(
            f"log.trackers must name trackers that can start, got {name}: {type(error).__name__}: "
            f"{error}:{login} correct its settings, or leave it out"
        ) from error


def _make(name: str, project: str) -> Tracker:
    """Import and return the tracker of a name; ValueError if that fails."""
    try:
        return TensorBoard() if name == "tensorboard" else OnlineTracker(name, project)
    # a package may raise anything: AttributeError if it is an empty folder of that name, TypeError
    # if it fits no protobuf that is installed
    except Exception as error:
        raise ValueError(
            f"log.trackers must name packages that are installed, got {name}: {error}; "
            f"pip install 'kdrl-kernels[{name}]', or leave it out"
        ) from error
