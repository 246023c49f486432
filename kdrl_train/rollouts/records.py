"""Reads the records of a data set from files, folders and the hub."""

import csv
import importlib
import json
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_train.config import DataConfig
from kdrl_train.hub import unreachable
from kdrl_train.rollouts.columns import plain

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that `datasets` writes beside the data of a folder."""
KINDS = ".jsonl, .json, .csv or .parquet"
MOST_JSON_BYTES = 2**30
"""Largest .json file, which is read in one piece; the other formats are read record by record."""
SHORT = 15
"""Characters of a decimal that nobody rounded to 32 bits: such have 17 or more in 64 bits."""
MOST_CELL = 2**24
"""Longest text in a cell of a .csv file, in characters; Python's own bound is 131,072."""
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?")


def data_records(config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, record) for the whole data set, in file order; messages name a record by its
    place.

    A record is a line of a .jsonl file that is not blank, an object of the list in a .json file or
    the only object there, a row of a .csv or .parquet file, or a row of a hub data set. Values are
    dicts, lists, texts and numbers; in a .csv file all are texts.

    Args:
        config: `path` is a file, a folder of them (those whose name starts with the split; all of
            them where no name starts with a split's name), or a hub id, which may name a
            configuration after a colon ("openai/gsm8k:main") and is read by `datasets`.
    Raises: FileNotFoundError for a path that does not exist; ValueError for a file that is damaged.
    """
    path = Path(config.path)
    if config.path and path.is_file():
        yield from _file_records(path)
    elif config.path and path.is_dir():
        for file in _split_files(path, config.split):
            yield from _file_records(file)
    elif _HUB_ID.fullmatch(config.path) and path.suffix not in SUFFIXES:
        yield from _hub_records(config)
    else:
        got = f"{config.path!r} (looked in {Path.cwd()}): correct data.path"
        raise FileNotFoundError(
            f"data.path must be an existing {KINDS} file, a folder of them, or a hub id, "
            f"got {got if config.path else 'nothing: set data.path'}"
        )


def _split_files(folder: Path, split: str) -> list[Path]:
    """List the files of a split, in the order of their names."""
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix in SUFFIXES and file.is_file() and file.name not in NOT_DATA
    )
    chosen = [file for file in files if file.name.startswith(split)]
    if not chosen and not any(file.name.startswith(_SPLIT_NAMES) for file in files):
        chosen = files
    if not chosen:
        names = ", ".join(file.name for file in files) or f"no {KINDS} file"
        raise FileNotFoundError(
            f"data.split must start the name of a file in {folder}, got {split!r} with {names}: "
            "set data.split, or name the file in data.path"
        )
    return chosen


def _file_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    readers = {
        ".jsonl": _jsonl_records,
        ".json": _json_records,
        ".csv": _csv_records,
        ".parquet": _parquet_records,
    }
    if path.suffix not in readers:
        raise ValueError(f"data.path must end in {KINDS}, got {str(path)!r}: convert the file")
    yield from readers[path.suffix](path)


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
        _require_names(path, file.schema_arrow.names)
        number, schema = 0, file.schema_arrow
        for batch in file.iter_batches():
            for record in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield f"{path.name}:{number}", plain(_as_written(record, schema))
    except (importlib.import_module("pyarrow").ArrowException, OSError) as error:
        raise ValueError(
            f"{path} must be a whole parquet file, got {str(error).rstrip('.')}: copy it again"
        ) from error


def _as_written(record: dict[str, Any], schema: Any) -> dict[str, Any]:
    """Return a record with the decimals that its numbers of 16 and 32 bits were rounded from.

    schema: of Arrow.
    """
    narrow = [field for field in schema if "float" in str(field.type)]  # float64 is "double"
    return record | {field.name: _decimal(record[field.name], field.type) for field in narrow}


def _decimal(value: Any, kind: Any) -> Any:
    """Return 0.1 for 0.10000000149011612 of the Arrow type float32, also where it is nested.

    A float32 that is short in 64 bits too, such as 2^-13, stays.
    """
    types = importlib.import_module("pyarrow.types")
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if isinstance(value, float):
        if types.is_float16(kind):
            value = float(str(np.float16(value)))
        elif types.is_float32(kind) and len(repr(value)) > SHORT:
            value = float(str(np.float32(value)))
        return value
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_decimal(inner, kind.value_type) for inner in value]
    if types.is_struct(kind) and isinstance(value, dict):
        return {field.name: _decimal(value[field.name], field.type) for field in kind}
    if types.is_map(kind) and isinstance(value, dict):
        return {name: _decimal(inner, kind.item_type) for name, inner in value.items()}
    return value


def _json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(
            f"{path} must have at most {MOST_JSON_BYTES:,} bytes, as a .json file is read in one "
            f"piece, got {path.stat().st_size:,}: write one record a line into a .jsonl file"
        )
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _jsonl_records(path)  # as many do call such a file
            return
        raise ValueError(f"{path} must be JSON in UTF-8, got {error}: correct the file") from error
    records = content.get("data") if isinstance(content, dict) else content
    if isinstance(content, dict) and _is_record(content):
        records = [content]
    if not isinstance(records, list):
        raise ValueError(
            f'{path} must hold a list of records, {{"data": [...]}} with such a list, a record on '
            f"each line, or a single record, got {reprlib.repr(content)}: convert the file"
        )
    for number, record in enumerate(records, start=1):
        yield f"{path.name}:{number}", _require_record(path, f"{path.name}:{number}", record)


def _is_record(content: dict[str, Any]) -> bool:
    """Whether an object is a record itself: it is none of lists alone, as columns or splits are."""
    return "data" not in content and not all(isinstance(v, list) for v in content.values())


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    before, number = csv.field_size_limit(MOST_CELL), 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            _require_names(path, rows.fieldnames or [])
            for row in rows:
                if None in row or None in row.values():
                    raise csv.Error(f"not one cell for each of {rows.fieldnames}")
                yield f"{path.name}:{number}", row
                number += 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path.name}:{number} in {path.parent} must be a row of comma-separated values in "
            f"UTF-8, got {error}: correct the file"
        ) from error
    finally:
        csv.field_size_limit(before)


def _require_names(path: Path, names: Sequence[str]) -> None:
    """Raise ValueError where columns have no name, or the same: of two one would be lost."""
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(
            f"{path} must have a name of its own for each column, got {list(names)}: correct them"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of an object in JSON. Raises: ValueError for a key that stands twice, of which
    the last would win."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {reprlib.repr(twice)} twice in one object")
    return values


def _require_record(path: Path, place: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(
            f"{place} in {path.parent} must be a JSON object, got {record!r}: correct the line"
        )
    return record


def _jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            try:
                record = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, deep brackets
                said = str(error)
                if isinstance(error, json.JSONDecodeError):  # its "line 1" is this one
                    said = f"{error.msg} at column {error.colno}"
                raise ValueError(
                    f"{place} in {path.parent} must be one JSON object in UTF-8, got {said}: "
                    "correct the line"
                ) from error
            yield place, _require_record(path, place, record)


def _hub_records(config: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    why = unreachable()
    datasets = importlib.import_module("datasets")
    name, _, configuration = config.path.partition(":")
    try:
        records = datasets.load_dataset(name, configuration or None, split=config.split)
    except (OSError, ValueError) as error:  # unknown id, no network, unknown split or configuration
        said = " ".join(str(error).split())
        if why:
            said = f"the hub cannot be reached ({why}), and its cache has no such set: name a file"
        raise ValueError(
            f"data.path must be an existing file or folder, or a hub id that has data.split = "
            f"{config.split!r}, got {config.path!r}: {said}"
        ) from error
    schema = records.features.arrow_schema
    for number, record in enumerate(records, start=1):
        yield f"{config.path}:{number}", plain(_as_written(record, schema))
