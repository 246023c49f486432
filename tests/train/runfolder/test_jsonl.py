"""What jsonl reads is what it wrote."""

from pathlib import Path

from kdrl_train.runfolder import jsonl


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
