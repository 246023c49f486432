"""JSON lines: one row a line, no NaN, whole after a kill."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def line(row: Mapping[str, Any]) -> str:
    """One line, with its end. A number that is not finite becomes null: JSON has no NaN."""
    return json.dumps(_finite(row), ensure_ascii=False) + "\n"


def read(path: Path) -> list[Record]:
    """Rows of a file; a torn line (the process was killed) ends them. No file: none."""
    rows: list[Record] = []
    if not path.exists():
        return rows
    whole = path.read_text(encoding="utf-8", errors="replace")  # torn within a character, too
    for text in whole.removesuffix("\n").split("\n"):  # splitlines would cut at U+2028
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return rows


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file as a whole; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.tmp")
    work.write_text("".join(line(row) for row in rows), encoding="utf-8")
    os.replace(work, path)


def append(path: Path, row: Record) -> None:
    """One more line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line(row))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
