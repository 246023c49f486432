"""Output that nobody reads any more costs a command nothing."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kdrl_train import __main__, cli
from kdrl_train.config import TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.output import Guarded, guard, guarded, loss
from kdrl_train.rollouts import verifier_worker
from kdrl_train.runfolder import jsonl


def unread_pipe() -> Any:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


def closed_terminal() -> Any:
    pty = pytest.importorskip("pty")  # not on Windows
    master, slave = pty.openpty()
    os.close(master)
    return os.fdopen(slave, "w", buffering=1)


@pytest.fixture(params=[(unread_pipe, errno.EPIPE), (closed_terminal, errno.EIO)])
def gone(request: pytest.FixtureRequest) -> Iterator[tuple[Any, int]]:
    """A stream without a reader, and the number of the error that a write to it raises."""
    make, number = request.param
    stream = make()
    yield stream, number
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what it still holds
    stream.close()


def test_writes_without_a_reader_are_dropped(gone: tuple[Any, int]) -> None:
    stream, number = gone
    output = guard(stream)
    assert loss(output) is None
    assert output.write("one\n") == 4
    output.writelines(["two\n", "three\n"])
    print("four", file=output, flush=True)
    error = loss(output)
    assert error is not None
    assert error.errno == number


def test_with_a_reader_everything_is_as_before() -> None:
    stream = io.StringIO()
    output = guard(stream)
    assert guard(output) is output
    print("one", file=output, flush=True)
    output.writelines(["two\n"])
    assert (output.getvalue(), output.lost) == ("one\ntwo\n", None)
    assert guard(None) is None  # Python's stdout where the shell closed it
    with guarded():
        assert isinstance(sys.stdout, Guarded)
    assert not isinstance(sys.stdout, Guarded)


class FullDisk(io.StringIO):
    def write(self, _text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left"):
        guard(FullDisk()).write("a table\n")


def test_a_reward_function_may_print_without_a_reader(
    gone: tuple[Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def talkative(completion: str, answer: str) -> float:
        print(completion, flush=True)
        return float(completion == answer)

    monkeypatch.setattr(sys, "stdout", gone[0])
    monkeypatch.setattr(sys, "stderr", gone[0])
    monkeypatch.setattr(verifier_worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(verifier_worker, "_reward", lambda _: talkative)
    verifier_worker.start_worker("exact")
    for _ in range(2):
        assert verifier_worker.judge("exact", "7", "7", 5.0) == (1.0, "right", "", None)


def test_a_pipe_that_closes_early_is_no_error() -> None:
    with unread_pipe() as out:
        done = subprocess.run(
            [sys.executable, "-m", "kdrl_train", "train", "--help-all"],
            stdout=out,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupt)
    monkeypatch.setattr(sys, "argv", ["kdrl_train", "train"])
    assert __main__.start() == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.slow
def test_a_run_goes_on_without_its_console(config: Callable[..., TrainConfig]) -> None:
    settings = config(steps=8)
    file = settings.out.with_suffix(".yaml")
    save_yaml(settings, file)
    process = subprocess.Popen(
        [sys.executable, "-m", "kdrl_train", "train", "--config", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stderr.close()
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    events = jsonl.read(settings.out / "events.jsonl")
    assert [event["event"] for event in events] == ["started", "console", "finished"]
    assert "[Errno 32] Broken pipe" in events[1]["message"]
