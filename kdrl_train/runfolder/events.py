"""Writes events.jsonl: starts, stops and errors of a run, and the software it ran on."""

import platform
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from kdrl_train.config import TrainConfig
from kdrl_train.output import presentable
from kdrl_train.runfolder import jsonl

FILE = "events.jsonl"
PACKAGES = ("kdrl-kernels", "torch", "triton", "transformers", "numpy", "mpmath")


class Events:
    """The events of one run folder.

    A resumed run keeps the events of the steps that it repeats, since they did happen; its event
    `resumed` says from which step it goes on and how many records of metrics.jsonl it dropped.
    The README of this folder lists the kinds of events and their keys.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._lock = threading.Lock()  # a teacher's outage is reported by a thread
        jsonl.keep(self.path, len(jsonl.read(self.path)))  # without a torn line at the end

    def add(self, step: int, event: str, message: str, **more: Any) -> None:
        """Append an event; `step` is the number of optimiser steps that are done."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        record = {
            "time": time,
            "step": step,
            "event": event,
            "message": presentable(message),
            **more,
        }
        with self._lock:
            jsonl.append(self.path, record)


@contextmanager
def recorded(log: Any, config: TrainConfig, ranks: int) -> Iterator[None]:
    """Note in a RunLog that the steps of the block begin, and the error that ends them, if any.

    The error is raised on.
    """
    done, steps = log.steps_done, config.steps
    todo = f"steps {done + 1} to {steps}"
    if done >= steps:
        todo = f"{done} steps are done, of {steps}: a larger --steps goes on"
    if log.dropped_records:
        todo += f"; steps since the last checkpoint that are lost: {log.dropped_records}"
    log.event(
        "resumed" if config.resume else "started",
        f"{config.out}: {todo}",
        dropped=log.dropped_records,
        ranks=ranks,
        versions=versions(),
    )
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # a full disk must not hide the error
            notes = {"notes": error.__notes__} if hasattr(error, "__notes__") else {}
            log.event("failed", f"{type(error).__name__}: {error}", say=False, **notes)
        raise


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results, and this commit.

    The commit is absent where this code is not in a checkout.
    """
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    commit = _commit(Path(__file__).parent)
    return installed if commit is None else installed | {"commit": commit}


def _commit(folder: Path) -> str | None:
    """Return the commit of a folder's checkout, with "-dirty" if files differ from it.

    None: the folder is in no checkout.
    """
    git = ["git", "-C", str(folder)]
    is_tracked = [*git, "ls-files", "--error-unmatch", "events.py"]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(is_tracked, capture_output=True, check=True, timeout=10)
        result = subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or an installed package
    return result.stdout.strip()
