"""Text that a terminal or rich would obey is shown: controls are escaped, markup is printed."""

import io
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from kdrl_train import cli, output
from kdrl_train.batch import OUTCOMES
from kdrl_train.method.evaluation import EvalResult
from kdrl_train.output import guard, guarded, presentable
from kdrl_train.runfolder import jsonl
from kdrl_train.start.preflight import CheckResult, results_table
from kdrl_train.tools import demo, evaluate, replay
from kdrl_train.tools.demo import DemoResult, Measurement
from tests.train.run_folders import run_folder

ROOT = Path(__file__).parents[2]
HOSTILE = "a\x1b[2J\x1b]52;c;cm0=\x07b\rc\bd\u202ee\x9b31mf\x7fg\ud800h\u2028i\x00"
HARMLESS = (
    "a\\u001b[2J\\u001b]52;c;cm0=\\u0007b\\u000dc\\u0008d\\u202ee\\u009b31mf\\u007fg\\ud800h\\u2028i"
    "\\u0000"
)
NAME = "[/red]x[bold]:ok: \x1b[31my"
SHOWN = "[/red]x[bold]:ok: \\u001b[31my"


class TerminalOutput(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.fault("control characters")
def test_controls_are_escaped_wherever_text_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for stream, colour in ((io.StringIO(), ""), (TerminalOutput(), "\x1b[31m")):
        monkeypatch.setattr(sys, "stdout", stream)
        with guarded():
            print(HOSTILE + "\tand\n" + "\x1b[31mü\r")
            console = output.guarded_console()
            console.print(Text(NAME, "red"), NAME)
            console.print(Text(HOSTILE[:5]), soft_wrap=True)
        text = stream.getvalue()
        printed = colour or r"\u001b[31m"
        assert text.startswith(f"{HARMLESS}\tand\n{printed}ü\r\n")
        reset = colour and "\x1b[0m"
        assert text.endswith(f"{colour}{SHOWN}{reset} {SHOWN}\na\\u001b[2J\n")


def test_bars_of_progress_may_return_to_the_start_of_their_line() -> None:
    stream = guard(io.StringIO())
    for text in ("\r 10%", "\r 20%", "\r    \r", "done\r\n"):
        stream.write(text)
    stream.write("100% \rfinished\r!")
    assert stream.getvalue() == "\r 10%\r 20%\r    \rdone\r\n100% \\u000dfinished\\u000d!"


@pytest.mark.fault("control characters")
def test_progress_and_files_of_a_run_hold_no_controls(tmp_path: Path) -> None:
    progress = output.Progress(guard(io.StringIO()), terminal=False, clock=lambda: 0.0)
    progress.begin(f"loading {HOSTILE}", at_once=True)
    assert progress.stream.getvalue() == f"loading {HARMLESS}\n"
    path = tmp_path / "events.jsonl"
    jsonl.append(path, {"message": HOSTILE, HOSTILE: "\n\t"})
    raw = path.read_text("utf-8")
    assert raw == f'{{"message": "{HARMLESS}", "{HARMLESS}": "\\n\\t"}}\n'.replace(
        "\\u000d", "\\r"
    ).replace("\\u0008", "\\b")
    assert jsonl.read(path) == [{"message": HOSTILE, HOSTILE: "\n\t"}]


@pytest.mark.fault("control characters")
def test_an_error_of_ours_is_escaped_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise LookupError(HOSTILE)

    monkeypatch.setattr(cli, "run", fail)
    assert cli.main(["train"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith(f"LookupError: {HARMLESS}\n")


def prints_of(folder: Path) -> dict[str, Callable[[], object]]:
    """Commands, and what prints a name that rich or a terminal would take for commands."""
    console = output.guarded_console(Console(width=300))  # a caller's, which reads markup
    same = Measurement(accuracy=0.5, length=3.0, truncated=0.0, kl=0.1)
    run = DemoResult(before=same, after=same, teacher=same, seconds={"total": 1}, run=Path(NAME))
    one = replay.Replayed(0, NAME, 1, 0.0, NAME, 0.0, 0.0, 0.0, 0.0, -1.0)
    result = EvalResult(
        problems=1, samples=1, avg_at_k=0.5, pass_at_k={1: 0.5}, maj_at_k=None, mean_length=1.0,
        intervals={"avg@1": (0.0, 1.0)}, truncated=0.0, seconds=1.0,
        outcomes=dict.fromkeys(OUTCOMES, 0),
    )  # fmt: skip
    page = str(folder / f"{NAME}.html")
    return {
        "eval": lambda: console.print(evaluate.result_table({NAME: result})),
        "check": lambda: console.print(results_table([CheckResult("prompts", True, NAME)])),
        "replay": lambda: console.print(replay.table([one], "step 0")),
        "demo": lambda: console.print(demo.result_table(run, demo.DemoConfig())),
        "report": lambda: cli.main(["report", str(run_folder(folder / NAME, [])), "--out", page]),
        "no run": lambda: cli.main(["report", f"absent {NAME}"]),
        "no command": lambda: cli.main([NAME]),
    }


@pytest.mark.fault("control characters")
@pytest.mark.parametrize(
    "command", ["eval", "check", "replay", "demo", "report", "no run", "no command"]
)
def test_a_name_is_no_markup(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prints_of(tmp_path)[command]()
    printed = "".join(capsys.readouterr())
    assert SHOWN in printed
    for page in tmp_path.rglob("*.html"):
        assert SHOWN.partition("/")[2] in page.read_text("utf-8")
        assert output.CONTROL.search(page.read_text("utf-8")) is None


def test_every_console_is_guarded() -> None:
    for path in (ROOT / "kdrl_train").rglob("*.py"):
        if path.name != "output.py":
            assert not re.search(r"\bConsole\(", path.read_text("utf-8")), path


@pytest.mark.fault("control characters")
@pytest.mark.parametrize("text", [";" + "token" * 20_000, "://a" * 20_000, "://" + "a" * 100_000])
def test_no_text_takes_long_to_show(text: str) -> None:
    start = time.process_time()
    assert presentable(text) == text
    assert time.process_time() - start < 1  # 20 ms; minutes where each letter is a new beginning
