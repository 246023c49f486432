"""Tests the readings, the results file and the command line of bench/."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bench.__main__ as main
from bench import machine, results_file
from bench.ops import OPS_BY_NAME, Op
from bench.results_file import OURS, SKETCH, Record, Run
from bench.shapes import TINY

GRPO = OPS_BY_NAME["GRPO"]


# machine

GPU = {"clocks.sm": "1980", "temperature.gpu": "45", "power.draw": "312.57"}
READINGS = {"clock_mhz": 1980.0, "temperature_c": 45.0, "power_w": 312.57}


def _nvidia_smi(answers: list[dict[str, str]]) -> Callable[..., Any]:
    """Fake subprocess.run: it prints the readings that the command names, a line for each GPU."""

    def run(command: Sequence[str], **_: Any) -> Any:
        assert command[0] == "nvidia-smi"
        (names,) = (one.partition("=")[2] for one in command if one.startswith("--query-gpu="))
        lines = [", ".join(gpu[name] for name in names.split(",")) + "\n" for gpu in answers]
        return subprocess.CompletedProcess(command, 0, "".join(lines), "")

    return run


def _raises(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize("others", [0, 1], ids="{} more GPUs".format)
def test_readings_of_a_gpu(others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [GPU, *[dict.fromkeys(GPU, "7")] * others]
    monkeypatch.setattr(subprocess, "run", _nvidia_smi(answers))
    monkeypatch.setattr(machine, "DEVICE", "cuda")
    assert machine.readings() == READINGS


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(_raises(FileNotFoundError("nvidia-smi")), id="missing"),
        pytest.param(_raises(subprocess.CalledProcessError(9, "nvidia-smi")), id="no driver"),
        pytest.param(_raises(subprocess.TimeoutExpired("nvidia-smi", 10)), id="hangs"),
        pytest.param(_nvidia_smi([{**GPU, "power.draw": "[N/A]"}]), id="does not tell"),
        pytest.param(_nvidia_smi([]), id="no GPU"),
    ],
)
def test_no_readings_of_a_gpu(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(machine, "DEVICE", "cuda")
    assert machine.readings() == {}


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("cpu MHz\t\t: 2000.5\ncache size\t: 9 KB\ncpu MHz\t\t: 3000.5\n", {"clock_mhz": 2500.5}),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", {}),
    ],
    ids=["two cores", "no clock"],
)
def test_readings_of_a_cpu(
    cpuinfo: str, expected: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "DEVICE", "cpu")
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine, "Path", lambda _: SimpleNamespace(read_text=lambda: cpuinfo))
    assert machine.readings() == expected


# results file

MACHINE = {"device": "CPU", "threads": 2, "torch": "2", "triton": "3", "python": "3.11"}


def _speed(op: str = "GRPO", **changes: Any) -> Record:
    return results_file.record("speed", op, TINY, "reasoning", OURS, **changes)


def _run(*records: Record, **machine_: Any) -> Run:
    return {
        "machine": {**MACHINE, **machine_},
        "command": "python -m bench",
        "started": "2026-01-01T10:00:00+00:00",
        "finished": None,
        "records": list(records),
    }


def test_load_of_pytest_benchmark(tmp_path: Path) -> None:
    records = [_speed(total_ms=[1.0]), _speed("JSD", total_ms=[2.0]), _speed("KDRL k2")]
    content = {
        "machine_info": {"node": "x", "kdrl": MACHINE},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": [
            {"name": "a", "extra_info": {"records": records[:2]}},
            {"name": "of something else", "extra_info": {}},
            {"name": "b", "extra_info": {"records": records[2:]}},
        ],
    }
    path = tmp_path / "0001.json"
    path.write_text(json.dumps(content))
    run = results_file.load(path)
    assert run["records"] == records
    assert run["machine"] == MACHINE
    assert run["started"] == content["datetime"]


def test_load_reads_what_save_wrote(tmp_path: Path) -> None:
    run = _run(_speed(total_ms=[1.0]), _speed("JSD", status="not installed"))
    results_file.save(run, tmp_path / "a", done=True)
    assert run["finished"] is not None
    assert results_file.load(tmp_path / "a") == run
    assert results_file.load(tmp_path / "a" / "results.json") == run


UNRELATED = {
    "another dict": {"name": "x", "version": 3},
    "no machine": {"records": []},
    "no records": {"machine": MACHINE},
}


@pytest.mark.parametrize("content", UNRELATED.values(), ids=list(UNRELATED))
def test_unrelated_json_is_named(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "package-lock.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="package-lock") as refused:
        results_file.load(path)
    assert str(sorted(content)) in str(refused.value)


LATE = {"status": results_file.OUT_OF_TIME}
FAILED = {"status": "failed: RuntimeError: x"}
OLD, NEW = {"total_ms": [1.0]}, {"total_ms": [2.0]}


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (OLD, NEW, NEW),
        (OLD, LATE, OLD),
        (LATE, NEW, NEW),
        (LATE, LATE, LATE),
        (OLD, FAILED, FAILED),
    ],
    ids=["later", "figures", "at last", "never", "breaks"],
)
def test_merge_keeps_the_later_that_was_run(
    before: dict[str, Any], after: dict[str, Any], kept: dict[str, Any]
) -> None:
    one_run, another = _run(_speed(**before), _speed("JSD")), _run(_speed(**after))
    merged = results_file.merge([one_run, another])
    assert merged["records"] == [_speed(**kept), _speed("JSD")]
    assert merged["machine"] == MACHINE


def test_merge_adds_a_case_that_is_late_and_new() -> None:
    merged = results_file.merge([_run(_speed()), _run(_speed("JSD", **LATE))])
    assert [one["op"] for one in merged["records"]] == ["GRPO", "JSD"]


def test_merge_tells_cases_apart() -> None:
    """A case changes with the shape, profile, provider, kind and point of an axis."""
    base = _speed(axis="N", value=64, total_ms=[1.0])
    others = [("shape", "cpu"), ("profile", "flat"), ("provider", "x"), ("kind", "scaling")]
    others += [("axis", "V"), ("op", "JSD")]
    records = [base, {**base, "value": 128}, *({**base, name: value} for name, value in others)]
    merged = results_file.merge([_run(one) for one in records])
    assert merged["records"] == records


@pytest.mark.parametrize("name", list(MACHINE))
def test_merge_refuses_another_machine(name: str) -> None:
    with pytest.raises(ValueError, match=f"of one machine, got {name} {MACHINE[name]} and other"):
        results_file.merge([_run(), _run(), _run(**{name: "other"})])


# command line


def _board(*arguments: str) -> main.Scoreboard:
    return main.Scoreboard(main.arguments().parse_args(["--out", "x", *arguments]))


STAGES = list(main.STAGES)


@pytest.mark.parametrize(
    "stages",
    [
        STAGES,
        *(pytest.param([one], marks=pytest.mark.slow) for one in STAGES),
        ["scaling", "speed"],
        ["shapes", "memory", "rows"],
    ],
    ids=" ".join,
)
def test_stages_share_the_time(stages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, float]] = []

    def stub(stage: str) -> Callable[..., list[Record]]:
        def run(_: main.Scoreboard, deadline: float) -> list[Record]:
            begun.append((stage, deadline))
            return [_speed(stage)]

        return run

    for stage in STAGES:
        monkeypatch.setattr(main.Scoreboard, f"_{stage}", stub(stage))
    board = _board("--minutes", "3", "--stages", *stages)
    records = list(board.records())
    in_order = [stage for stage in STAGES if stage in stages]
    assert [one["op"] for one in records] == [stage for stage, _ in begun] == in_order
    ends = [deadline - board.start for _, deadline in begun]
    assert all(a < b for a, b in zip([0.0, *ends], ends, strict=False)), ends
    assert ends[-1] == pytest.approx(180, abs=1e-3)


@pytest.mark.parametrize("truth", ["whole", "sampled"])
def test_what_is_typed_first_is_measured_first(truth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str], bool]] = []

    def speed_records(op: Op, _: Any, contestants: Any, *rest: Any) -> list[Record]:
        calls.append((op.name, [one.name for one in contestants], rest[-1]))
        return []

    monkeypatch.setattr(main.speed, "records", speed_records)
    ops, names = ["KDRL exact", "GRPO"], ["Cut cross-entropy", OURS]
    arguments = ["--shape", "tiny", "--stages", "speed", "--truth", truth]
    board = _board(*arguments, "--ops", *ops, "--providers", *names)
    assert list(board.records()) == []
    assert calls == [(op, names, truth == "sampled") for op in ops]


@pytest.mark.parametrize(
    ("typed", "first"), [([], ["GRPO", "KDRL exact"]), (["JSD", "reverse KL"], ["reverse KL"])]
)
def test_memory_follows_the_operations(
    typed: list[str], first: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops: list[str] = []
    monkeypatch.setattr(main.memory, "records", lambda op, *_: ops.append(op.name) or [])
    board = _board("--stages", "memory", *(["--ops", *typed] if typed else []))
    assert list(board.records()) == []
    assert ops[: len(first)] == first


def test_a_table_is_written_after_each_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def records(_: main.Scoreboard) -> Iterator[Record]:
        yield _speed(status="failed: x")
        assert not (tmp_path / "short.md").exists()
        yield _speed("JSD", status="failed: x")
        assert "| GRPO |" in (tmp_path / "short.md").read_text()
        raise KeyboardInterrupt

    _without_effects(monkeypatch, tmp_path)
    monkeypatch.setattr(main.Scoreboard, "records", records)
    assert main.main() == 130


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (["--out", "/home/me/x"], "python -m bench --out DIR"),
        (
            ["--ops", "KDRL exact", "--out", "/home/me/x", "--minutes", "2"],
            "python -m bench --ops 'KDRL exact' --out DIR --minutes 2",
        ),
        (["--minutes", "2"], "python -m bench --minutes 2"),
    ],
    ids=["alone", "between", "none"],
)
def test_command_hides_the_folder(typed: list[str], shown: str) -> None:
    before = list(typed)
    assert main._command(typed) == shown
    assert typed == before


@pytest.mark.parametrize("typed", [["--out=/home/me/x"], ["--out", "/home/me/x"]], ids=" ".join)
def test_command_hides_the_folder_however_it_is_typed(typed: list[str]) -> None:
    assert main.arguments().parse_args(typed).out == Path("/home/me/x")
    assert "/home/me" not in main._command(typed)


@pytest.mark.parametrize("name", ["stages", "ops", "providers", "shape", "profile"])
def test_parser_refuses_what_it_does_not_know(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        _board(f"--{name}", "nonsense")
    assert refused.value.code == 2
    assert f"--{name}: invalid choice: 'nonsense'" in capsys.readouterr().err


def test_parser_wants_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.arguments().parse_args([])
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("provider", "status", "code"),
    [
        (OURS, "ok", 0),
        (OURS, "out of time", 0),
        (OURS, "differs: error of dweight", 1),
        (OURS, "failed: out of memory", 1),
        (SKETCH, "differs: relative error", 1),
        (SKETCH, "not supported: x", 0),
        ("other", "differs: no dweight", 0),
        ("other", "failed: RuntimeError: x", 0),
    ],
)
def test_exit_code(
    provider: str, status: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_effects(monkeypatch, tmp_path)
    one = results_file.record("speed", "GRPO", TINY, "flat", provider, status=status)
    monkeypatch.setattr(main.Scoreboard, "records", lambda _: iter([one, _speed("JSD")]))
    assert main.main() == code
    run = results_file.load(tmp_path)
    assert run["finished"] is not None
    assert run["records"] == [one, _speed("JSD")]


def test_exit_code_of_a_run_that_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def records(_: main.Scoreboard) -> Iterator[Record]:
        yield _speed(status="failed: x")
        raise KeyboardInterrupt

    _without_effects(monkeypatch, tmp_path)
    monkeypatch.setattr(main.Scoreboard, "records", records)
    assert main.main() == 130
    run = results_file.load(tmp_path)
    assert run["finished"] is None
    assert len(run["records"]) == 1


def _without_effects(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Keep main(), run in this process, from changing its signals and threads."""
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(folder)])
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)
    monkeypatch.setattr(main, "set_up_cpu", lambda: None)
    monkeypatch.setattr(main.report, "write", lambda _: "a report")
