"""Keeps a run folder for one run: by a lock, and by an id that is read before anything is written.

Rank 0 locks the file .lock, and the kernel frees it when the process ends, however it ends. Some
network file systems have no locks. There a run that begins replaces the id in the file, and the
older run, which finds another id than its own, writes nothing more and stops.
"""

import json
import os
import socket
import time
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO
from uuid import uuid4

from kdrl_train import output
from kdrl_train.errors import RunError, require_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
WAIT_S = 30.0
"""Seconds that a resumed run waits for the lock: ranks whose launcher was killed need some of them
to notice, and to save the steps that are done. torchrun gives its ranks as many to stop."""
POLL_S = 0.2


class RunLock(AbstractContextManager["RunLock"]):
    """Holds a run folder until its block is left; a folder that is new and empty is removed then.

    Args:
        folder: the run folder; made if absent.
        wait_s: seconds to wait for another run to end.
    Raises: RunError naming the process that holds the folder.
    """

    def __init__(self, folder: Path, wait_s: float = 0.0) -> None:
        self.folder = folder
        self.unsupported: str | None = None
        """A warning where the folder has no locks; None where it has."""
        self._path = folder / FILE
        self._id = uuid4().hex
        self._made = [place for place in (folder, *folder.parents) if not place.exists()]
        self._file = self._lock(time.monotonic() + wait_s)
        if self.unsupported is None:
            self._write()

    def _lock(self, deadline: float) -> IO[str]:
        """Open and lock the file. Raises: RunError where another process still holds it then."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._path.is_symlink():  # it would be followed
                self._path.unlink(missing_ok=True)
            require_file(self._path)
            file = self._path.open("a", encoding="utf-8")
            try:
                if fcntl is None:
                    raise OSError("Windows has no flock")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._path.exists() and os.path.samestat(
                    self._path.stat(), os.fstat(file.fileno())
                ):
                    return file  # and not one that another run has just removed
            except BlockingIOError:
                file.close()
                if time.monotonic() >= deadline:
                    raise RunError(
                        f"{self.folder} must be of one run at a time, got a second one while "
                        f"{self._holder()}: wait for its end or stop it, or choose another --out"
                    ) from None
                output.begin(f"waiting up to {WAIT_S:.0f} s: {self._holder()}")
                time.sleep(POLL_S)
            except OSError as error:
                self.unsupported = (
                    f"{self.folder} has no locks ({error}): let no second run begin in it, which "
                    "would stop this one"
                )
                return file
            file.close()

    def claim(self) -> None:
        """Put the id of this run into a folder without locks, before the first write to it.

        Only then: a run that is refused must not end the one that is at work.
        """
        if self.unsupported is not None:
            self._write()

    def is_ours(self) -> bool:
        """Say whether no other run has begun in the folder since `claim`; a small read."""
        text = self._text()
        return text is None or self._id in text

    def require_ours(self) -> None:
        """Raise RunError where another run has begun in the folder."""
        if not self.is_ours():
            raise RunError(
                f"{self.folder} must be of one run at a time, got a second one: {self._holder()}. "
                "This run stops here and writes nothing more: its steps since the last checkpoint "
                "are dropped; choose another --out for one of the two"
            )

    def __exit__(self, *_: object) -> None:
        text = self._text()
        if text is not None and (self._id in text or not text):
            self._path.unlink()
        self._file.close()
        for place in self._made:
            if any(place.iterdir()):
                break
            place.rmdir()

    def _text(self) -> str | None:
        """Return what is in the file; None where somebody has removed it, which begins no run."""
        try:
            return self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        """Write who holds the folder."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"id": self._id, "pid": os.getpid(), "host": socket.gethostname(), "since": since}
        self._path.write_text(json.dumps(holder) + "\n", encoding="utf-8")

    def _holder(self) -> str:
        """Say in a clause who holds the folder."""
        try:
            holder = json.loads(self._text() or "")
            return (
                f"process {holder['pid']} on {holder['host']} has held it since {holder['since']}"
            )
        except (ValueError, TypeError, KeyError):  # it is being written
            return "another process holds it"
