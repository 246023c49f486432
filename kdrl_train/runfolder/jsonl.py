"""Reads and writes JSON lines: one record a line, without NaN; a file is replaced whole.

A killed process leaves a torn last line at most, which is left out. Any other damage is refused,
unless the line still is a record: another digit or letter is not seen. A checksum would have to be
in each line, where every reader of these files would meet it.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kdrl_train.errors import require_file, written
from kdrl_train.output import escape

Record = dict[str, Any]


def line(record: Mapping[str, Any]) -> str:
    """Return a record as one line with its end.

    A number that is not finite becomes null, since JSON has no NaN. A character that would command
    a terminal is escaped.
    """
    return escape(json.dumps(_finite(record), ensure_ascii=False)) + "\n"


def refuse(message: str) -> None:
    """Raise ValueError for a damaged line."""
    raise ValueError(message)


def read(path: Path, damaged: Callable[[str], None] = refuse) -> list[Record]:
    """Return the records of a file, as `numbered`."""
    return list(numbered(path, damaged).values())


def numbered(path: Path, damaged: Callable[[str], None] = refuse) -> dict[int, Record]:
    """Return the records of a file by the numbers of their lines, from 1.

    A file that does not exist has none. A torn last line is left out.

    damaged: called with a message for every other line that is no record, which is left out, too.
    """
    require_file(path)
    records = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]  # U+2028 ends no line
    for number, part in enumerate(lines, start=1):
        try:
            records[number] = _record(part)
        except (ValueError, RecursionError) as error:
            if number < len(lines) or not _is_torn(part, error):
                damaged(damage(path, number, "a record, a JSON object", str(error)))
    return records


def damage(path: Path, number: int, must: str, got: str) -> str:
    """Write the message about a damaged line."""
    return (
        f"line {number} of {path} must be {must}, got {got}: restore the file from a copy, or move "
        "it away to go on without what it holds"
    )


def _record(part: bytes) -> Record:
    """Read a line without its end. Raises: ValueError or RecursionError if it is no record."""
    if b"\0" in part:
        raise ValueError("NUL bytes, which a crashed file system leaves")
    record = json.loads(part.decode("utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}")
    return record


def _is_torn(part: bytes, error: Exception) -> bool:
    """Say whether a last line, which raised `error`, is only the beginning of a record."""
    if isinstance(error, UnicodeDecodeError):
        cut = error.reason == "unexpected end of data"  # within a character
    else:  # what a whole record ends with was not its end, but is damaged
        cut = isinstance(error, json.JSONDecodeError) and error.msg != "Extra data"
    return part == b"" or (cut and part.startswith(b"{"))


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file as a whole; its folder is made if absent."""
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(line(record) for record in records))


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a file; where the disk is full, nothing of it.

    Raises: OSError naming the file if it cannot be written.
    """
    text = line(record).encode()
    with (
        written(path),
        path.open("ab", buffering=0) as file,
    ):  # a buffer would be written again as it is closed
        size = file.tell()
        try:
            while text:
                text = text[file.write(text) :]
        except OSError as error:
            file.truncate(size)
            error.filename = str(path)
            raise


def keep(path: Path, count: int) -> None:
    """Cut a file after its first `count` lines, which stay as they are, and end the last."""
    text = path.read_bytes() if path.exists() else b""
    kept = b"".join(part + b"\n" for part in text.split(b"\n")[:count])
    if kept == text and path.exists():
        return
    work = path.with_name(f".{path.name}.tmp")
    with written(path):
        work.unlink(missing_ok=True)  # a link would be followed
        with work.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file
        work.replace(path)


def replace_text(path: Path, text: str) -> None:
    """Replace the text of a file: a killed process leaves the old text or the new one."""
    work = path.with_name(f".{path.name}.tmp")
    with written(path):
        work.unlink(missing_ok=True)  # a link would be followed
        work.write_text(text, encoding="utf-8")
        work.replace(path)


def _finite(value: Any) -> Any:
    """Return a JSON value with None in place of every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
