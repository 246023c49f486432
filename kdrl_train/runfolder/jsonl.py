"""Reads and writes JSON lines: one record a line, without NaN; a file is replaced whole."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdrl_train.output import escape

Record = dict[str, Any]


def line(record: Mapping[str, Any]) -> str:
    """Return a record as one line with its end.

    A number that is not finite becomes null, since JSON has no NaN. A character that would command
    a terminal is escaped.
    """
    return escape(json.dumps(_finite(record), ensure_ascii=False)) + "\n"


def read(path: Path) -> list[Record]:
    """Return the records of a file up to the first torn line, which a killed process leaves.

    A file that does not exist has none.
    """
    records: list[Record] = []
    if not path.exists():
        return records
    text = path.read_text(encoding="utf-8", errors="replace")  # a character may be torn, too
    for part in text.removesuffix("\n").split("\n"):  # splitlines would cut at U+2028
        try:
            records.append(json.loads(part))
        except json.JSONDecodeError:
            break
    return records


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file as a whole; its folder is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(line(record) for record in records))


def append(path: Path, record: Record) -> None:
    """Append one record to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line(record))


def replace_text(path: Path, text: str) -> None:
    """Replace the text of a file: a killed process leaves the old text or the new one."""
    work = path.with_name(f".{path.name}.tmp")
    work.write_text(text, encoding="utf-8")
    os.replace(work, path)


def _finite(value: Any) -> Any:
    """Return a JSON value with None in place of every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
