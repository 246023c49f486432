"""records: every format gives the same records, and a damaged file is named."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from kdrl_train.config import DataConfig
from kdrl_train.rollouts import records
from kdrl_train.rollouts.records import data_records

RECORDS = [
    {"question": 'Add 1,\nand "1" ≤ 2.', "answer": "007"},
    {"question": "What is 2 + 2?", "answer": "4"},
]


def read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return list(data_records(DataConfig(path=str(path))))


def write_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["list", "data", "lines", "csv", "csv of a spreadsheet"])
def test_every_format_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("set.csv" if "csv" in kind else "set.json")
    if "csv" in kind:
        write_csv(path, RECORDS, "utf-8-sig" if "spreadsheet" in kind else "utf-8")
    elif kind == "lines":
        path.write_text("\n".join(map(json.dumps, RECORDS)))
    else:
        path.write_text(json.dumps(RECORDS if kind == "list" else {"v": 1, "data": RECORDS}))
    assert read(path) == [(f"{path.name}:{i}", record) for i, record in enumerate(RECORDS, 1)]


def test_a_single_object_is_a_record(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    record = {"question": [{"role": "user", "content": "1+1"}], "answer": "2"}
    path.write_text(json.dumps(record, indent=1))
    assert read(path) == [("set.json:1", record)]


def test_a_folder_of_every_format(tmp_path: Path) -> None:
    write_csv(tmp_path / "train-1.csv", RECORDS[:1])
    (tmp_path / "train-2.json").write_text(json.dumps(RECORDS[1:]))
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    assert [record for _, record in read(tmp_path)] == RECORDS


def test_values_of_parquet_become_plain(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    table = pyarrow.table(
        {
            "price": pyarrow.array(["12.50"]).cast(pyarrow.decimal128(6, 2)),
            "day": pyarrow.array([0], pyarrow.date32()),
            "nested": [{"list": [{"a": 1}], "none": None}],
            "map": pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        }
    )
    pyarrow.parquet.write_table(table, path)
    plain = {"list": [{"a": 1}], "none": None}
    assert read(path) == [
        ("set.parquet:1", {"price": "12.50", "day": "1970-01-01", "nested": plain, "map": {"k": 1}})
    ]


def test_numbers_of_32_bits_are_the_decimals_that_were_written(tmp_path: Path) -> None:
    """A gold answer of 0.10000000149011612 would make every completion wrong."""
    single, half = pyarrow.float32(), pyarrow.float16()
    numbers = [0.1, 2.0**-13, 27.0, None, -1234.56]
    table = pyarrow.table(
        {
            "answer": pyarrow.array(numbers, single),
            "half": pyarrow.array(np.array([0.1, 0.25, 27, 0, -0.7], np.float16), half),
            "rm": pyarrow.array([{"gt": [x]} for x in numbers]).cast(
                pyarrow.struct({"gt": pyarrow.list_(single)})
            ),
            "map": pyarrow.array(
                [[("k", x)] for x in numbers], pyarrow.map_(pyarrow.string(), single)
            ),
            "exact": pyarrow.array([float(np.float32(0.1))] * 5, pyarrow.float64()),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "set.parquet")
    assert [record for _, record in read(tmp_path / "set.parquet")] == [
        {
            "answer": x,
            "half": h,
            "rm": {"gt": [x]},
            "map": {"k": x},
            "exact": 0.10000000149011612,
        }
        for x, h in zip(numbers, [0.1, 0.25, 27.0, 0.0, -0.7], strict=True)
    ]


def test_a_long_cell_of_a_csv_is_read(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = [{"question": "x" * 200_000, "answer": "1"}]
    assert [record for _, record in read(write_csv(tmp_path / "set.csv", long))] == long
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.csv", b"a,b\n1,2\n3", r"set\.csv:2 in .* not one cell for each of \['a', 'b'\]"),
        ("set.csv", b"a,b\n1,2,3\n", r"set\.csv:1 in .* must be a row of comma-separated values"),
        ("set.csv", b'a,b\n"1"x,2\n', r"set\.csv:1 in .* got ',' expected after"),
        ("set.csv", b"a,b\n1,\xff\n", r"set\.csv:1 in .* in UTF-8, got 'utf-8' codec"),
        ("set.csv", b"a,a\n1,2\n", r"a name of its own for each column, got \['a', 'a'\]"),
        ("set.json", b"[{]", r"set\.json must be JSON in UTF-8, got Expecting"),
        ("set.json", b"[" * 100_000, r"set\.json must be JSON in UTF-8, got"),
        ("set.json", b'{"data": {"a": 1}}', r"must hold a list of records, .* got \{'data': "),
        (
            "set.json",
            b'{"question": ["1+1"], "answer": ["2"]}',
            r"a single record, got \{'answer'",
        ),
        ("set.json", b"{}", r"must hold a list of records, .* or a single record, got \{\}"),
        ("set.json", b'[{"a": 1}, 2]', r"set\.json:2 in .* must be a JSON object, got 2"),
        (
            "set.json",
            b'[{"a": 1, "a": 2}]',
            r"set\.json must be JSON .* key 'a' twice in one object",
        ),
        ("set.jsonl", b'{}\n{"a": {"b": 1, "b": 1}}', r"set\.jsonl:2 in .* got the key 'b' twice"),
        (
            "set.parquet",
            b"PAR1 PAR1",
            r"set\.parquet must be a whole parquet file, got .*: copy it",
        ),
        ("set.json", b'{"a": 1}\n2', r"set\.json:2 in .* must be a JSON object, got 2"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_json_file_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MOST_JSON_BYTES", 10)
    (tmp_path / "set.json").write_text(json.dumps(RECORDS))
    with pytest.raises(ValueError, match=r"at most 10 bytes, .* write one record a line into a"):
        read(tmp_path / "set.json")
