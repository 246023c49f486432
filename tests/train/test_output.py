"""Output that nobody reads any more costs a command nothing; progress is shown on stderr."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdrl_train import __main__, cli, output
from kdrl_train.config import TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.output import Guarded, guard, guarded, loss
from kdrl_train.rollouts import verifier_worker
from kdrl_train.runfolder import jsonl
from kdrl_train.tools import report

ROOT = Path(__file__).parents[2]


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
    guarded_stream = guard(stream)
    assert loss(guarded_stream) is None
    assert guarded_stream.write("one\n") == 4
    guarded_stream.writelines(["two\n", "three\n"])
    print("four", file=guarded_stream, flush=True)
    error = loss(guarded_stream)
    assert error is not None
    assert error.errno == number


def test_with_a_reader_everything_is_as_before() -> None:
    stream = io.StringIO()
    guarded_stream = guard(stream)
    assert guard(guarded_stream) is guarded_stream
    print("one", file=guarded_stream, flush=True)
    guarded_stream.writelines(["two\n"])
    assert (guarded_stream.getvalue(), guarded_stream.lost) == ("one\ntwo\n", None)
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
    if sys.platform == "linux":  # the bound would hold for all tests
        monkeypatch.setattr(verifier_worker.resource, "setrlimit", lambda *_: None)
    verifier_worker.start_worker(["exact"], 1 << 40)
    for _ in range(2):
        judged = verifier_worker.judge(
            verifier_worker.JudgeRule(("exact",)), {"completion": "7", "answer": "7"}
        )
        assert judged == (1.0, "right", "", None, (1.0,))


def test_a_pipe_that_closes_early_is_no_error() -> None:
    with unread_pipe() as out:
        done = subprocess.run(
            [sys.executable, "-m", "kdrl_train", "train", "--help-all"],
            stdout=out,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes descriptors")
def test_no_file_gets_the_number_of_a_closed_descriptor(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(  # what the command imports first of all that is large
        "import os\n"
        "numbers = [os.open(os.devnull, os.O_WRONLY) for _ in range(3)]\n"
        f"open({str(tmp_path / 'numbers')!r}, 'w').write(str(min(numbers)))\n"
        "raise OSError('torch is imported')"
    )
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m kdrl_train train <&- >&- 2>&-"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        check=False,
    )
    assert done.returncode == 1
    assert int((tmp_path / "numbers").read_text("utf-8")) > 2


def test_ctrl_c_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupt)
    monkeypatch.setattr(sys, "argv", ["kdrl_train", "train"])
    assert __main__.start() == 130
    assert capsys.readouterr() == ("", "interrupted\n")


class Screen:
    """A Progress on a stream that is read here, with a clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
        self.now, self.stream = 0.0, guard(io.StringIO())
        self.progress = output.Progress(self.stream, terminal, lambda: self.now)
        self.progress.heading = "train"
        monkeypatch.setattr(output, "_shown", self.progress)

    def after(self, seconds: float) -> str:
        """Let time pass and return what was written since the last call."""
        self.now += seconds
        self.progress.update()
        text: str = self.stream.getvalue()
        self.stream.stream.seek(0)
        self.stream.stream.truncate()
        return text


def test_a_pipe_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=False)
    output.begin("starting")
    assert [screen.after(0.25), screen.after(0.25)] == ["", "train: starting\n"]
    output.begin("loading a model", at_once=True)
    output.begin("rollouts")
    output.count("rollouts", 3, 8)
    assert screen.after(29.5) == "train: loading a model\n"
    assert screen.after(0.5) == "train: rollouts 3 of 8, 0:00:30\n"
    assert screen.after(29.5) == ""
    print("step 1", file=screen.stream)  # any other line also says that the run is alive
    assert [screen.after(29.0), screen.after(1.0)] == [
        "step 1\n",
        "train: rollouts 3 of 8, 0:01:30\n",
    ]


def test_a_terminal_has_one_line_that_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, erase = Screen(monkeypatch, terminal=True), output.ERASE
    output.begin("rollouts")
    for done in range(1000):
        output.count("rollouts", done, 1000)  # drawn five times a second at most
    assert screen.after(0.0) == f"{erase}train: rollouts"
    assert screen.after(0.2) == f"{erase}train: rollouts 999 of 1,000"
    assert screen.after(0.2) == ""  # as it was
    print("a warning", file=screen.stream)
    assert screen.after(0.0) == f"{erase}a warning\n{erase}train: rollouts 999 of 1,000"
    screen.stream.write("half a ")
    assert screen.after(60.0) == f"{erase}half a "  # whose line stays its own
    screen.stream.write("line\n")
    assert screen.after(0.0) == f"line\n{erase}train: rollouts 999 of 1,000, 0:01:00"
    output.begin("x" * 200)
    assert screen.after(0.2) == f"{erase}train: {'x' * 72}"  # of 80 columns


def test_tokens_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch, terminal=False)
    output.begin("rollouts")
    report = output.meter("rollouts", 64, lambda: screen.now)
    report(0, 0)
    assert screen.progress.line() == "train: rollouts 0 of 64"
    screen.now = 4.0
    report(3, 5000)
    assert screen.progress.line() == "train: rollouts 3 of 64, 1,250 tokens/s"
    output.begin("learning")
    report(4, 6000)  # by a thread that draws ahead
    assert screen.progress.line() == "train: learning"
    output.heading("step 2/9")
    output.count("learning", 5, None, " completions")
    assert screen.progress.line() == "step 2/9: learning 5 completions"


def test_hours() -> None:
    texts = [output.hours(seconds) for seconds in (0, 59.4, 59.6, 3599, 3600, 26 * 3600 + 61)]
    assert texts == ["0:00:00", "0:00:59", "0:01:00", "0:59:59", "1:00:00", "26:01:01"]


def test_only_rank_0_shows_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, line in (("1", ""), ("0", "train: loading\n")):
        monkeypatch.setenv("RANK", rank)
        with output.shown("train"):
            output.begin("loading", at_once=True)
        output.begin("nothing", at_once=True)
        assert capsys.readouterr() == ("", line)


def test_the_first_line_comes_before_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('torch is imported')")
    done = subprocess.run(
        [sys.executable, "-m", "kdrl_train", "train"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = ["train: loading Python packages", "error: torch is imported"]
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (1, "", lines)


def test_packages_are_not_loaded_while_a_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    monkeypatch.setattr(report, "main", lambda _config: stages.append(output._shown.stage))
    assert cli.main(["report", "a run"]) == 0
    assert stages == ["working"]


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
    messages = {event["event"]: event["message"] for event in events}
    assert set(messages) == {"prompt", "started", "console", "finished"}
    assert "[Errno 32] Broken pipe" in messages["console"]
