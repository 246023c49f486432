"""A place that cannot be written is refused by the name of its setting; nothing is left behind."""

import os
from pathlib import Path
from typing import Any

import pytest

from kdrl_train.runfolder import writable
from kdrl_train.runfolder.writable import require_writable, require_writable_file


def test_a_place_that_can_be_written_stays_as_it_is(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b" / "c")
    require_writable(tmp_path)
    require_writable_file(tmp_path / "a" / "result.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/run", "file/runs/first"])
def test_a_file_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^out must lead to a folder that can be written, got .*"):
        require_writable(tmp_path / name)
    assert (tmp_path / "file").read_text("utf-8") == "kept"


def test_a_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(writable.tempfile, "TemporaryFile", refuse)
    message = r"must lead to .*, got .*/a/b \(Read-only file system\): choose another"
    with pytest.raises(ValueError, match=message):
        require_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []  # also what it had made


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^out must be a file, got .*, which is a folder"):
        require_writable_file(tmp_path)
