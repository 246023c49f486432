"""What jsonl reads is what it wrote, and a damaged line is named."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.log import read_records
from kdrl_train.runfolder.resume import check_log

RECORDS = [{"step": step, "reward": 0.25 + step, "kl": None} for step in range(3)]


@pytest.mark.fault("flipped or cut file")
def test_any_text_comes_back_and_a_torn_line_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records = [{"text": text} for text in ("a\u2028b", "c\x85d", "e\r\n\x1cf", "\N{SNOWMAN}")]
    jsonl.write(path, records[:2])
    for record in records[2:]:
        jsonl.append(path, record)
    assert jsonl.read(path) == records
    path.write_bytes(path.read_bytes()[:-5])  # within the snowman, of three bytes
    assert jsonl.read(path) == records[:3]
    path.write_bytes(b"")
    assert jsonl.read(path) == []


@pytest.mark.fault("flipped or cut file")
def test_every_cut_leaves_the_lines_before_it(
    tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    path = tmp_path / "metrics.jsonl"
    jsonl.write(path, RECORDS)
    text = path.read_bytes()
    for size in range(len(text)):
        path.write_bytes(text[:size])
        whole = (text[:size] + b"\n" * (text[size : size + 1] == b"\n")).count(b"\n")
        assert read_records(tmp_path) == RECORDS[:whole], size
    record_property("tried", len(text))


@pytest.mark.fault("flipped or cut file")
def test_every_flipped_bit_is_named_or_changes_no_more_than_a_value(
    tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """No record is ever lost of a run that has done three steps."""
    path = tmp_path / "metrics.jsonl"
    jsonl.write(path, RECORDS)
    text = path.read_bytes()
    refused = []
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        number = text[: bit // 8].count(b"\n") + 1
        try:
            check_log(tmp_path, 3)
        except ValueError as error:
            refused.append((number, str(error)))
        else:
            records = read_records(tmp_path)
            assert [record["step"] for record in records] == [0, 1, 2]
            assert sum(one != other for one, other in zip(records, RECORDS, strict=True)) == 1
        assert path.read_bytes() == flipped
    assert len(refused) > 4 * len(text)
    for number, message in refused:  # or the next line, which does not follow a flipped step
        assert any(f"line {n} of {path} must be" in message for n in (number, number + 1))
        assert "restore the file from a copy, or move it away" in message
    record_property("tried", 8 * len(text))


@pytest.mark.fault("flipped or cut file")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "must be a record, a JSON object, got a list"),
        (b"", "must be a record, a JSON object, got Expecting value"),
        (b"\0\0\0", "must be a record, a JSON object, got NUL bytes, which a crashed file system"),
        (b'{"a": ' + b"[" * 99_999, "must be a record, a JSON object, got maximum recursion"),
        (b'{"reward": 1}', "must be a record of step 2 or later, got step None"),
        (b'{"step": "2"}', "must be a record of step 2 or later, got step '2'"),
        (b'{"step": 2.0}', "must be a record of step 2 or later, got step 2.0"),
        (b'{"step": true}', "must be a record of step 2 or later, got step True"),
        (b'{"step": 1}', "must be a record of step 2 or later, got step 1"),
        (b'{"step": 0}', "must be a record of step 2 or later, got step 0"),
    ],
)
def test_what_is_no_record_is_refused_or_said(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n%b\n{"step": 2}\n' % line)
    with pytest.raises(ValueError, match="line 3 of") as error:
        read_records(tmp_path)
    assert message in str(error.value)
    said: list[str] = []
    assert [record["step"] for record in read_records(tmp_path, said.append)] == [0, 1, 2]
    assert said == [str(error.value)]
    path.write_bytes(b'{"step": 0}\n\0\0\0')  # at the end of the file, too
    with pytest.raises(ValueError, match="line 2 of"):
        read_records(tmp_path)


@pytest.mark.fault("full disk")
def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    jsonl.append(path, {"step": 0})
    real_open = Path.open

    class Full:
        """Takes five bytes of what is written."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 5

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            count, self.room = self.file.write(data[: self.room]), 0
            return int(count)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *a, **k: Full(real_open(*a, **k)))
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
            jsonl.append(path, {"step": 1})
    assert path.read_bytes() == b'{"step": 0}\n'
    jsonl.append(path, {"step": 1})
    assert jsonl.read(path) == [{"step": 0}, {"step": 1}]
