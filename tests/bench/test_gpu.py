"""Tests the course of bench/gpu.sh: limits, what a stopped part leaves, the report, the archive."""

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import bench.__main__ as scoreboard
from bench import gpu, gpu_parts, machine
from bench.gpu_parts import Part
from bench.results_file import OURS, SKETCH

ROOT = Path(__file__).parents[2]
Run = Callable[..., str]


def _part(name: str, code: str, budget: float = 20, **more: Any) -> Part:
    return Part(name=name, budget=budget, command=("-c", code, "{out}", "{minutes}"), **more)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run main() with other parts, and return the report that it prints."""
    set_handler = signal.signal

    def interruptible(number: int, handler: Any) -> None:
        if number == signal.SIGINT:  # SIGTERM stays that of pytest
            set_handler(number, handler)

    def run_parts(parts: list[Part], *typed: str, code: int = 0) -> str:
        (tmp_path / "out/report.md").unlink(missing_ok=True)
        monkeypatch.setattr(gpu, "parts", lambda *_, **__: tuple(parts))
        monkeypatch.setattr(gpu.signal, "signal", interruptible)
        monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path / "out"), *typed])
        assert gpu.main() == code
        report = (tmp_path / "out" / "report.md").read_text("utf-8")
        assert capsys.readouterr().out == f"{report}\n"
        return report

    return run_parts


@pytest.mark.parametrize("rehearse", [False, True])
def test_limits_leave_room_for_all(rehearse: bool) -> None:
    every = {part.name: part for part in gpu_parts.parts(["x.whl"], rehearse)}
    first = [one for one in every.values() if one.name != "curve"]
    assert list(every)[-1] == "curve"
    assert sum(one.budget + one.grace for one in first) <= gpu.SECONDS < 600
    assert every["curve"].budget + gpu_parts.GRACE <= 180
    assert list(every)[:5] == ["wheels", "machine", "kernels", "ours", "peers"]


def test_wheels_are_installed_whatever_is_named(run: Run) -> None:
    """A second call may find a machine without what the first one installed."""
    parts = [_part("wheels", "print('No wheels in')", always=True), _part("a", ""), _part("b", "")]
    report = run(parts, "--parts", "b")
    assert report.startswith("wheels:\n\n    No wheels in\n\n| part |")
    assert re.findall(r"\| (\w+) \|.*ok", report) == ["wheels", "b"]
    first, second, *others = gpu_parts.parts(["x.whl"], rehearse=False)
    assert (first.command[-1], first.always, second.always) == ("x.whl", True, True)
    assert not any(part.always for part in others)


def test_nothing_runs_without_a_gpu(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = gpu_parts.MACHINE
    monkeypatch.setattr(machine, "one_line", lambda _: "torch 2")
    monkeypatch.setattr(machine, "machine_info", dict)
    monkeypatch.setattr(machine, "readings", dict)
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(machine, "DEVICE", device)
        monkeypatch.setattr(sys, "argv", list(needed.command[1:]))
        with pytest.raises(SystemExit) if device == "cpu" else nullcontext() as ended:
            machine.main()
    assert ended.value.code == needed.stop
    assert "\nPyTorch must run on cuda (--device), runs on cpu" in capsys.readouterr().out
    parts = [_part("first", "raise SystemExit(3)", stop=3, why="no GPU"), _part("other", "")]
    assert "| other |  |  | left out: no GPU |\n" in run(parts, code=1)
    crashed = [_part("first", "raise SystemExit(1)", stop=3), _part("other", "")]
    assert re.search(r"\| other \|.*\| ok \|", run(crashed, code=1))


def test_an_archive_is_outside_of_what_it_holds(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run([_part("a", "")], "--archive", str(tmp_path / "new/a.tar.gz"))
    assert (tmp_path / "new/a.tar.gz").exists()
    with pytest.raises(SystemExit):
        run([_part("a", "")], "--archive", str(tmp_path / "out/a.tar.gz"))
    assert "--archive must be a file outside OUT, got" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ours", "peers"])
@pytest.mark.parametrize("rehearse", [False, True])
def test_scoreboards_take_their_arguments(name: str, rehearse: bool) -> None:
    part = next(one for one in gpu_parts.parts([], rehearse) if one.name == name)
    words = [*part.command, *(part.rehearsal if rehearse else ())]
    assert words[:2] == ["-m", "bench"]
    typed = [word.replace("{minutes}", "1.4") for word in words[2:]]
    args = scoreboard.arguments().parse_args(typed)
    assert (args.truth, args.ops[0], args.providers[0]) == ("sampled", "GRPO", OURS)
    assert args.out == Path("{out}") / name
    assert (args.shape == "tiny") == rehearse
    assert args.minutes == (0.5 if rehearse else 1.4)
    if not rehearse:
        assert args.ops == ["GRPO", "KDRL exact", "logprob + entropy", "GRPO, half at 0"]
        assert (args.providers[1] == SKETCH) == (name == "ours")


def test_kernel_tests_are_those_of_a_gpu_and_begin_with_the_rows() -> None:
    names = [Path(name).stem for name in gpu_parts.kernel_tests(False)]
    assert all((ROOT / f"tests/kernels/{name}.py").exists() for name in names)
    assert {*names[:3]} == {"test_rows", "test_rows_left_out", "test_no_sync"}
    assert "test_kdrl_loss" in names
    assert not {"test_compile", "test_vocab_group"} & {*names}, "they run on CPUs alone"
    assert len(gpu_parts.kernel_tests(True)) == 3


WRITES = """
import sys, time
try:
    open(sys.argv[1] + "/table.md", "w").write("| what it knows |")
    time.sleep(60)
except KeyboardInterrupt:
    open(sys.argv[1] + "/table.md", "a").write(" and more |")
    sys.exit(130)
"""
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_part_that_is_cut_short_leaves_what_it_has(run: Run, tmp_path: Path) -> None:
    writes = _part("writes", WRITES, tables=("table.md",))
    deaf = _part("deaf", DEAF, grace=0.5)
    archive = tmp_path / "all.tar.gz"
    start = time.monotonic()
    report = run(
        [writes, deaf, _part("last", "print('3 passed, 1 skipped in 2.5s')")],
        *("--cut", "5", "--archive", str(archive)),
    )
    assert time.monotonic() - start < 45
    sections, _, table = report.partition("| part |")
    assert sections == "| what it knows | and more |\n\n"
    rows = [re.sub(r"\| \d+ \| \d+ \|", "|", line) for line in table.splitlines()[2:]]
    assert rows == [
        "| writes | stopped at its limit |",
        "| deaf | killed after its limit |",
        "| last | ok: 3 passed, 1 skipped in 2.5s |",
    ]
    child = int((tmp_path / "out/deaf.log").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z", "it is killed with the part"
    with tarfile.open(archive) as kept:
        assert {"out/table.md", "out/report.md", "out/last.log"} <= {*kept.getnames()}
        assert report == kept.extractfile("out/report.md").read().decode()  # type: ignore[union-attr]


def test_what_failed_is_shown_and_fails_the_run(run: Run) -> None:
    code = "print('FAILED test_x\\nE   1 != 2\\nnoise'); raise SystemExit(3)"
    report = run([_part("tests", code, lines=gpu_parts.FAILURE)], code=1)
    assert report.startswith("tests:\n\n    FAILED test_x\n    E   1 != 2\n\n| part |")
    assert report.endswith("| failed with exit code 3 |\n")
    report = run([_part("board", "raise ValueError('x')")], "--rehearse", code=1)
    assert report.startswith("Rehearsal on a CPU with tiny sizes: no figure here is of a GPU.\n\n")
    assert "\n    ValueError: x\n" in report


def test_a_folder_with_a_report_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run([_part("a", "")])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "OUT must be a new folder, got" in capsys.readouterr().err


LOG = """
tests/kernels/test_rows.py::test_tiles[a]
[gw0] [  1%] PASSED tests/kernels/test_rows.py::test_tiles[a]
[gw1] [  1%] FAILED tests/kernels/test_no_sync.py::test_on_a_gpu[b]
[gw0] [100%] PASSED tests/kernels/test_rows.py::test_FAILED[c]
"""


def test_killed_tests_leave_what_they_have_found(run: Run) -> None:
    report = run([_part("tests", f"print({LOG!r})", lines=gpu_parts.FAILURE)])
    line = "[gw1] [  1%] FAILED tests/kernels/test_no_sync.py::test_on_a_gpu[b]"
    assert report.startswith(f"tests:\n\n    {line}\n\n| part |")
    assert report.endswith("| ok: 2 passed, 1 failed |\n")


def test_many_lines_are_cut(run: Run) -> None:
    code = "for i in range(100): print('FAILED', i, 'x' * 200)"
    report = run([_part("tests", code, lines=gpu_parts.FAILURE)])
    lines = report.splitlines()
    assert lines[2] == "    84 more"
    assert lines[3].startswith("    FAILED 84 xxx")
    assert max(map(len, lines)) == 4 + gpu.WIDTH


def test_time_that_a_part_leaves_goes_to_the_next_that_takes_it(run: Run) -> None:
    say = "import sys; print('1 passed in 1s', sys.argv[2])"
    parts = [_part("a", say, 74), _part("b", say, 74), _part("c", say, 74, most=134)]
    report = run([*parts, _part("d", say, 134, most=194)])
    minutes = re.findall(r"in 1s ([\d.]+) \|", report)
    assert minutes == ["1.00", "1.00", "2.00", "3.00"]


def test_all_limits_may_be_stretched(run: Run) -> None:
    say = "import sys; print('1 passed in 1s', sys.argv[2])"
    report = run([_part("a", say, 300, most=400), _part("b", say, 400)], "--stretch", "2")
    assert re.findall(r"\| (\d+) \| ok: 1 passed in 1s ([\d.]+) \|", report) == [
        ("600", "9.77"),
        ("800", "13.10"),
    ]
    report = run([_part("a", "", 300), _part("b", "", 1.9 * gpu.SECONDS)], "--stretch", "1.5")
    assert re.findall(r"\| (\w) \|.*\| (.*) \|", report) == [("a", "ok"), ("b", "ok")]


def test_what_has_no_time_is_left_out(run: Run, tmp_path: Path) -> None:
    parts = [_part("long", "", 90), _part("short", "print('1 passed in 1s')", 20)]
    report = run(parts, "--seconds", "30")
    assert "| long |  |  | left out: no time |\n" in report
    (tmp_path / "out/long.log").write_text("7 passed in 1s")  # of an earlier run
    assert "| long |  |  | left out: no time |\n" in run(parts, "--seconds", "30")
    assert "| 20 | ok: 1 passed in 1s |\n" in report
    report = run(parts, "--seconds", "30", "--parts", "short")
    assert "long" not in report


def test_a_run_that_is_stopped_has_a_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(process: Any, *_: float) -> str:
        process.kill()
        process.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "_end", stop)
    report = run([_part("a", "", tables=("a.log",)), _part("b", "")], code=130)
    assert report.count("stopped with the run") == report.count("left out: stopped") == 1


def test_the_archive_holds_no_weights(run: Run, tmp_path: Path) -> None:
    code = "import sys; [open(f'{sys.argv[1]}/{x}', 'w') for x in ('model.safetensors', 'x.png')]"
    run([_part("a", code)], "--archive", str(tmp_path / "a.tar.gz"))
    with tarfile.open(tmp_path / "a.tar.gz") as kept:
        assert {*kept.getnames()} == {"out", "out/x.png", "out/a.log", "out/report.md"}


@pytest.mark.slow  # starts pip three times
def test_a_wheel_that_does_not_fit_stops_no_other(tmp_path: Path) -> None:
    """pip installs all or nothing; without a network both fail here, each by itself."""
    wheels = [str(tmp_path / f"{name}-1.0-cp27-none-win32.whl") for name in "ab"]
    for wheel in wheels:
        Path(wheel).touch()
    command = [sys.executable, "-c", gpu_parts.INSTALL, *wheels, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "2 of 2 wheels are not installed"
    assert gpu_parts.TROUBLE.search(done.stderr.splitlines()[-1])


def test_the_script_runs_from_any_folder(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "bench/gpu.sh"), "--help"]
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": paths, "PYTHONPATH": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: bash bench/gpu.sh")


@pytest.mark.slow  # seconds of processes; the whole rehearsal takes minutes
def test_a_short_rehearsal(run: Run, tmp_path: Path) -> None:
    parts = [one for one in gpu_parts.parts([], rehearse=True) if one.name in ("sketch", "gemms")]
    report = run(parts, "--rehearse", "--stretch", "8")
    assert "| GRPO | reasoning | exact |" in report
    assert "copy of 0.067 GB" in report
    assert report.count("| ok |\n") == 2, (tmp_path / "out/sketch.log").read_text()
