"""Where a disk is full, the message names the file and says what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kdrl_train.config import EvaluateConfig, TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.model.teacher.client import TeacherInfo
from kdrl_train.model.teacher.identity import keep_teacher
from kdrl_train.runfolder import checkpoint, jsonl
from kdrl_train.runfolder.events import Events
from kdrl_train.runfolder.trackers import TensorBoard
from kdrl_train.tools import evaluate
from kdrl_train.tools.report import page
from tests.train.full_disk import full_disk
from tests.train.run_folders import record, run_folder

pytestmark = pytest.mark.fault("full disk")


RECORD = {"step": 0, "reward": 0.5, "loss": 0.25}


def write_teacher(path: Path) -> None:
    keep_teacher(path.parent, TeacherInfo(model="a teacher", window=99))


def write_report(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "render", lambda *_: "more than ten bytes")
        page.write({"a": [path.parent / "run"]}, path)


def write_scores(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "evaluate_sets", lambda *_: {"data": RECORD})
        patch.setattr(evaluate, "result_table", lambda _: "a table")
        patch.setattr(evaluate, "asdict", dict)
        evaluate.main(EvaluateConfig(out=path))


WRITERS: dict[str, Callable[[Path], object]] = {
    "metrics.jsonl": lambda path: jsonl.append(path, RECORD),
    "postponed.jsonl": lambda path: jsonl.write(path, [RECORD]),
    "events.jsonl": lambda path: Events(path.parent).add(0, "warning", "a message"),
    "wandb.json": lambda path: jsonl.replace_text(path, "some text of more bytes"),
    "config.yaml": lambda path: save_yaml(TrainConfig(), path),
    "teacher.json": write_teacher,
    "report.html": write_report,
    "scores.json": write_scores,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    run_folder(tmp_path / "run", [record(0)])
    message = rf"/{name} must be written, got .*too large.*: free space there or .*, then run the"
    with full_disk(), pytest.raises(OSError, match=message):
        WRITERS[name](path)
    if name not in ("report.html", "scores.json"):  # the run's own files hold whole lines alone
        assert not path.exists() or path.read_bytes() == b""
    WRITERS[name](path)
    assert path.stat().st_size > 10


def test_a_checkpoint_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    """Whether --resume starts again says the run, which may have saved since."""
    behind = RuntimeError("unexpected pos 704 vs 598")  # what torch.save makes of it
    behind.__context__ = OSError("no space")
    writer = RuntimeError("PytorchStreamWriter failed writing file")
    for error in (OSError("no space"), writer, behind):
        cause = "PytorchStreamWriter" if error is writer else "OSError: no space"
        message = rf"step 7 must .*{cause}.*: free space or correct --out, then --resume$"
        with pytest.raises(OSError, match=message), checkpoint.writing(tmp_path, 7):
            raise error


def test_tensorboard_names_its_folder(tmp_path: Path) -> None:
    board = TensorBoard()
    board.start({}, tmp_path, 0)

    def fail() -> None:
        raise OSError("no space")

    board.writer.flush, flush = fail, board.writer.flush
    with pytest.raises(OSError, match=r"/tensorboard must be written, got no space: free"):
        board.log(RECORD)
    board.writer.flush = flush
    board.close()
