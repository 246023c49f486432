"""Finds out, before anything costs time, whether results can be written where they should go, and
removes what is in their way."""

import shutil
import tempfile
from pathlib import Path


def require_writable(folder: Path) -> None:
    """Check that files can be written into a folder, which need not exist yet; change nothing.

    Raises: ValueError where they cannot: something there is a file, a disk is read-only, a
        permission is missing.
    """
    made: list[Path] = []
    try:
        absent = [place for place in (folder, *folder.parents) if not place.exists()]
        for place in reversed(absent):
            place.mkdir()
            made.append(place)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"out must lead to a folder that can be written, got {folder} ({error.strerror}): "
            "choose another, or make that one writable"
        ) from error
    finally:
        for place in reversed(made):
            place.rmdir()


def require_writable_file(file: Path) -> None:
    """Check that a file can be written, as `require_writable` does for a folder.

    Raises: ValueError for a folder or a pipe of that name, too: a pipe waits for its reader.
    """
    if file.is_dir():
        raise ValueError(f"out must be a file, got {file}, which is a folder: name a file in it")
    if file.is_fifo():
        raise ValueError(f"out must be a file, got {file}, which is a pipe: name a file")
    require_writable(file.parent)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if there is one; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
