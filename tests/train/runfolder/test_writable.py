"""A place that cannot be written is refused by the name of its setting; nothing is left behind."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrl_train.config import TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.model.teacher.client import TeacherInfo
from kdrl_train.model.teacher.identity import FILE as TEACHER
from kdrl_train.model.teacher.identity import check_same_teacher, keep_teacher
from kdrl_train.runfolder import checkpoint, durable, jsonl, writable
from kdrl_train.runfolder.export import export
from kdrl_train.runfolder.lock import FILE as LOCK
from kdrl_train.runfolder.lock import RunLock
from kdrl_train.runfolder.writable import require_writable, require_writable_file
from kdrl_train.tools.replay import load_dump


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


@pytest.mark.skipif(os.name == "nt", reason="POSIX has pipes among files")
@pytest.mark.fault("hostile config or data")
def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """eval waited for ever for a reader, after the measurement."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^out must be a file, got .*, which is a pipe"):
        require_writable_file(tmp_path / "pipe")


@pytest.mark.skipif(os.name == "nt", reason="POSIX has pipes among files")
@pytest.mark.fault("hostile checkpoint")
def test_no_run_opens_what_stands_in_a_files_place(tmp_path: Path) -> None:
    """A pipe as .lock, teacher.json or LATEST held a resumed run for ever."""
    for name in (LOCK, TEACHER):  # a folder is no file either, and opening one waits for nobody
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="must be a file, got a folder, pipe or device"):
        RunLock(tmp_path).__enter__()
    with pytest.raises(ValueError, match="must be a file, got a folder, pipe or device"):
        check_same_teacher(tmp_path, TeacherInfo(model="other", window=None))
    os.mkfifo(tmp_path / "LATEST")
    both_ends = os.open(tmp_path / "LATEST", os.O_RDWR)  # so that the next one to open it goes on
    durable.sync(tmp_path)  # a pipe cannot be flushed to the disk
    os.close(both_ends)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.fault("hostile checkpoint")
def test_a_link_in_the_place_of_a_small_file_is_not_followed(tmp_path: Path) -> None:
    """The settings were written over the user's file to which .config.yaml.tmp led."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    for name in (LOCK, ".config.yaml.tmp", f".{TEACHER}.tmp"):
        (run / name).symlink_to(victim)
    with RunLock(run):
        save_yaml(TrainConfig(), run / "config.yaml")
        keep_teacher(run, TeacherInfo(model="one", window=None))
        assert (run / LOCK).is_file()
    assert victim.read_text() == "mine"
    assert (run / "config.yaml").stat().st_size > 1000


@pytest.mark.skipif(os.name == "nt", reason="POSIX has pipes among files")
@pytest.mark.fault("hostile checkpoint")
def test_replay_takes_no_folder_for_a_dump(tmp_path: Path) -> None:
    """Opening a pipe waited for ever."""
    with pytest.raises(ValueError, match="got a folder, pipe or device"):
        load_dump(tmp_path)


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


OBSTACLES: dict[str, Callable[[Path, Path], object]] = {
    "link": link,
    "dangling link": lambda path, target: link(path, target / "absent"),
    "link to a file": lambda path, target: link(path, target / "file"),
    "pipe": pipe,
    "file": lambda path, _: path.write_text("", encoding="utf-8"),
}


@pytest.mark.skipif(os.name == "nt", reason="links and pipes need POSIX")
@pytest.mark.fault("hostile checkpoint")
@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_stands_in_the_way_of_a_save_is_removed_and_no_link_followed(
    kind: str, tmp_path: Path, tiny: Callable[..., Any], tokenizer: Any
) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "file").write_text("kept", encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    names = [".tmp_model", ".old_model", ".rows.jsonl.tmp", "checkpoints/.tmp_step_000001"]
    (run / "checkpoints").mkdir()
    (run / "model").mkdir()
    for name in names:
        OBSTACLES[kind](run / name, target)
    checkpoint.clean(run / "checkpoints")
    jsonl.write(run / "rows.jsonl", [{"step": 0}])
    export(tiny("llama"), tokenizer, run / "model")
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name[0] == ".")
    assert left == []
    assert jsonl.read(run / "rows.jsonl") == [{"step": 0}]
    assert (run / "model" / "config.json").is_file()
    assert not any((run / name).is_symlink() for name in ("rows.jsonl", "model"))
    assert [path.read_text("utf-8") for path in target.iterdir()] == ["kept"]
