"""Writes files that outlast a power cut."""

import os
from pathlib import Path


def write_through(path: Path, text: str) -> None:
    """Write a small file through to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def point_to(checkpoint: Path) -> None:
    """Write the name of the newest checkpoint into the file LATEST beside it."""
    work = checkpoint.with_name(".tmp_LATEST")
    write_through(work, checkpoint.name + "\n")
    work.rename(checkpoint.with_name("LATEST"))


def sync(folder: Path, *more: Path) -> None:
    """Flush every file of a folder, its directory entry, and more files to the disk."""
    if os.name == "nt":  # it flushes no directory; each file was flushed as it was written
        return
    for path in [*folder.iterdir(), folder, *more]:
        if path != folder and not path.is_file():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
