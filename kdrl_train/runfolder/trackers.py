"""TensorBoard, wandb and trackio: the numbers of metrics.jsonl, sent on to where a team looks.

metrics.jsonl is always written; these come on top, and are imported only when log.trackers names
them. A resumed run goes on in the same curve, each step in it once. One process of a run tracks.
"""

import importlib
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import yaml

from kdrl_train.config import LogConfig


class Tracker(Protocol):
    """One place where rows go."""

    def start(self, config: dict[str, Any], folder: Path, first_step: int) -> None:
        """Open the run of `folder`, or continue it; rows from `first_step` on will come."""

    def log(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl, with its "step"."""

    def close(self) -> None:
        """After the last row; also where `start` was never reached."""


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row but its step; what is None is left out."""
    return {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}


class TensorBoard:
    """Event files in tensorboard/ of the run folder.

    What a killed run wrote after its last checkpoint is purged by the event that a resumed one
    begins with.
    """

    def __init__(self) -> None:
        self.module = importlib.import_module("torch.utils.tensorboard")
        self.writer: Any = None

    def start(self, config: dict[str, Any], folder: Path, first_step: int) -> None:
        self.writer = self.module.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self.writer.add_text("config", f"```yaml\n{text}```", first_step)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()  # a killed run loses no row

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Service:
    """wandb or trackio, whose interfaces are one. They take rows in the order of their steps and
    take none back, so a file <name>.json in the run folder holds the run's name there and the next
    step it lacks: what a killed run sent after its last checkpoint is not sent again.
    """

    def __init__(self, name: str, project: str) -> None:
        self.init = importlib.import_module(name).init
        self.name = name
        self.project = project
        self.run: Any = None

    def start(self, config: dict[str, Any], folder: Path, first_step: int) -> None:
        self.path = folder / f"{self.name}.json"
        number = uuid4().hex[:8]
        self.state = {"id": number, "name": f"{folder.name}-{number}", "next_step": first_step}
        if self.path.exists():
            self.state = json.loads(self.path.read_text(encoding="utf-8"))
        own = {"name": self.state["name"]}  # trackio knows a run by its name
        if self.name == "wandb":
            own |= {"id": self.state["id"], "dir": str(folder)}
        self.run = self.init(project=self.project, config=config, resume="allow", **own)
        self._remember()

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] >= self.state["next_step"]:
            self.state["next_step"] = row["step"] + 1
            self._remember()  # first: killed in between, a row is missing there, and none is twice
            self.run.log(numbers(row), step=row["step"])

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()

    def _remember(self) -> None:
        work = self.path.with_name(f".{self.path.name}.tmp")
        work.write_text(json.dumps(self.state) + "\n", encoding="utf-8")
        work.replace(self.path)


class Trackers(AbstractContextManager["Trackers"]):
    """All trackers of a run, as one; a context manager that closes them, whatever happens.

    Args:
        config: which ones.
    Raises: ValueError, with the command that installs it, for one that cannot be imported.
    """

    def __init__(self, config: LogConfig) -> None:
        self.trackers = [_make(name, config.project) for name in config.trackers]

    def start(self, config: dict[str, Any], folder: Path, first_step: int) -> None:
        """config: plain values, as config_file.to_dict gives; folder: it exists."""
        for tracker in self.trackers:
            tracker.start(config, folder, first_step)

    def log(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl."""
        for tracker in self.trackers:
            tracker.log(row)

    def __exit__(self, *_: object) -> None:
        for tracker in self.trackers:
            tracker.close()


def _make(name: str, project: str) -> Tracker:
    try:
        return TensorBoard() if name == "tensorboard" else Service(name, project)
    except (ImportError, AttributeError) as error:  # the latter: an empty folder of that name
        raise ValueError(
            f"log.trackers must name packages that are installed, got {name}: {error}; "
            f"pip install 'kdrl-kernels[{name}]', or leave it out"
        ) from error
