"""events.jsonl: what happened to a run beside its steps, and what software it ran on."""

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
from kdrl_train.runfolder import jsonl

FILE = "events.jsonl"
PACKAGES = ("kdrl-kernels", "torch", "triton", "transformers", "numpy", "math-verify")


class Events:
    """The events of one run folder. They happened, so a resumed run keeps those of steps that it
    does again; its event `resumed` says from which step, and how many rows of metrics it drops.

    A row: time (ISO 8601, UTC), step (optimiser steps done by then), event (started, resumed,
    stopped, failed, finished; teacher: it is away, or back; rewards: some failed), message; started
    and resumed also have versions, ranks and dropped.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._lock = threading.Lock()  # a teacher's outage is reported by a thread
        if self.path.exists():
            jsonl.write(self.path, jsonl.read(self.path))  # a torn last line would spoil the next

    def add(self, step: int, event: str, message: str, **more: Any) -> None:
        """Append a row. step: optimiser steps that are done."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"time": time, "step": step, "event": event, "message": message, **more}
        with self._lock:
            jsonl.append(self.path, row)


@contextmanager
def recorded(log: Any, config: TrainConfig, ranks: int) -> Iterator[None]:
    """Around the steps of a run: notes in its RunLog `log` that they begin, on what, and the error
    that ends them, if one does; it is raised on."""
    log.event(
        "resumed" if config.resume else "started",
        f"{config.out}: steps {log.done + 1} to {config.steps}",
        dropped=log.dropped,
        ranks=ranks,
        versions=versions(),
    )
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # a full disk must not hide the error
            log.event("failed", f"{type(error).__name__}: {error}", say=False)
        raise


@cache
def versions() -> dict[str, str]:
    """Python, the packages that decide results, and the commit of this code where there is one."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    commit = _commit(Path(__file__).parent)
    return found if commit is None else found | {"commit": commit}


def _commit(folder: Path) -> str | None:
    """Commit of a folder's checkout, "-dirty" where it was changed since; None: not in one."""
    try:
        tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", "events.py"]
        subprocess.run(tracked, capture_output=True, check=True, timeout=10)
        ask = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(
            [*ask, "--exclude=*"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or an installed package
    return done.stdout.strip()
