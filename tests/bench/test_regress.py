"""Tests that a slower run fails the comparison with an older one, and that others pass."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import regress, results_file
from bench.ops import FLOOR
from bench.results_file import OURS, SKETCH, Run
from tests.bench.test_report import FLOOR_MS, make_run, speed


def changed(factors: list[float], slower_machine: float = 1.0, size: int | None = None) -> Run:
    """Change our time relative to the floor, and our memory, in the run of test_report."""
    run = copy.deepcopy(make_run())
    for one in run["records"]:
        if one["kind"] == "speed" and one["provider"] == FLOOR:
            one["total_ms"] = [slower_machine * ms for ms in FLOOR_MS]
        if one["kind"] == "speed" and one["provider"] == OURS:
            pairs = zip(factors, FLOOR_MS, strict=True)
            one["total_ms"] = [slower_machine * factor * ms for factor, ms in pairs]
        if one["kind"] == "memory" and one["provider"] == OURS and size is not None:
            one["extra_bytes"] = size
    return run


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return the exit code of the command on two runs."""

    def main(old: Run, new: Run, *options: str) -> int:
        for name, run in (("old", old), ("new", new)):
            results_file.save(run, tmp_path / name, done=True)
        arguments = [str(tmp_path / "old"), str(tmp_path / "new"), *options]
        monkeypatch.setattr(sys, "argv", ["regress", *arguments])
        return regress.main()

    return main


OLD = [1.0, 1.1, 1.2]


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        pytest.param(changed([1.3, 1.4, 1.5]), 1, id="slower"),
        pytest.param(changed([1.1, 1.2, 1.3]), 0, id="within the tolerance"),
        pytest.param(changed([1.0, 1.4, 1.5]), 1, id="quartiles just apart"),
        pytest.param(changed([0.7, 1.4, 1.5]), 0, id="quartiles overlap"),
        pytest.param(changed([0.7, 0.8, 0.9]), 0, id="faster"),
        pytest.param(changed(OLD, slower_machine=3.0), 0, id="a slower machine"),
        pytest.param(changed(OLD, size=60_000_000), 1, id="more memory"),
        pytest.param(changed(OLD, size=54_000_000), 0, id="a little more memory"),
    ],
)
def test_exit_code(code: Callable[..., int], new: Run, expected: int) -> None:
    assert code(changed(OLD), new) == expected


def test_tolerance(code: Callable[..., int]) -> None:
    old, new = changed(OLD), changed([1.3, 1.4, 1.5])
    assert code(old, new, "--tolerance", "0.5") == 0
    assert code(old, new, "--tolerance", "0.2") == 1


def test_table(code: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    code(changed(OLD), changed([1.31, 1.43, 1.51], size=60_000_000))
    lines = capsys.readouterr().out.splitlines()
    case = "| GRPO (cpu, reasoning) |"
    assert f"{case} time / floor | 1.10 (1.05-1.15) | 1.43 (1.37-1.47) | +30.0% | slower |" in lines
    assert f"{case} extra MB | 50.0 | 60.0 | +20.0% | more memory |" in lines
    assert lines[-1] == "2 of 2 figures got worse."


@pytest.mark.parametrize(
    ("status", "exit_code"),
    [("differs: dX by 0.3", 1), ("failed: it broke", 1), ("out of time", 0)],
)
def test_a_case_that_is_wrong_now_is_worse(
    status: str, exit_code: int, code: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = changed(OLD), changed(OLD)
    for run, op in ((old, "JSD"), (old, "forward KL"), (new, "JSD")):
        run["records"].append(speed(FLOOR, FLOOR_MS, op=op))
        run["records"].append(speed(OURS, FLOOR_MS, op=op))
    new["records"][-1]["status"] = status
    assert code(old, new) == exit_code
    text = capsys.readouterr().out
    assert "forward KL (cpu, reasoning): time / floor has vanished (not in the new run)" in text
    assert status in text


def test_a_slower_sketch_is_worse(
    code: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = changed(OLD), changed(OLD)
    for run, factor in ((old, 0.4), (new, 0.5)):
        run["records"].append(speed(SKETCH, [factor * ms for ms in FLOOR_MS]))
    assert code(old, new) == 1
    text = capsys.readouterr().out
    assert "| GRPO, sketch (cpu, reasoning) | time / floor | 0.40 (0.40-0.40) | 0.50" in text
    assert code(changed(OLD), new) == 0, "an older run had no sketch"


def test_nothing_to_compare_fails(code: Callable[..., int]) -> None:
    empty = changed(OLD)
    empty["records"] = []
    assert code(changed(OLD), empty) == 1


@pytest.mark.parametrize("name", ["device", "torch", "threads"])
def test_another_machine_is_refused(
    name: str, code: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    new = changed([0.1, 0.1, 0.1])
    new["machine"][name] = "another"
    with pytest.raises(SystemExit, match="2"):
        code(changed(OLD), new)
    assert f"runs must be of one machine, got {name}" in capsys.readouterr().err
