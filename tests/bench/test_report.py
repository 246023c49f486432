"""Tests the report of a small hand-written run: numbers, statuses, losses, plots, the page."""

import copy
from pathlib import Path
from typing import Any

import pytest

from bench import report, results_file
from bench.ops import FLOOR
from bench.reporting import figures, page, sections
from bench.reporting.losses import losses
from bench.reporting.tables import markdown, number, times
from bench.results_file import OURS, SKETCH, Record, Run, record
from bench.shapes import CPU, CPU_SMALL

ROOT = Path(__file__).parents[2]
MACHINE = {
    "device": "Test CPU (2 cores)",
    "threads": 2,
    "torch": "2.13.0",
    "triton": "3.9.0",
    "python": "3.11.7",
    "commit": "0123456789",
    "uncommitted": "",
}
FLOOR_MS = [100.0, 200.0, 400.0]  # the machine slows down twice: only ratios by round are steady
STATUSES = {
    "quack": "not installed",
    "fla": "not supported: a divergence | of three",
    "unsloth": "failed: RuntimeError: no\n  GPU",
    "verl": "differs: dX by 0.3",
    "trl": "out of time",
}


def speed(provider: str, ms: list[float], dx: float = 1e-6, **changes: Any) -> Record:
    """Make a record of GRPO on the shape "cpu", whose backward pass takes a quarter."""
    shape = changes.pop("shape", CPU)
    fields = {"package": None, "version": None, "setting": {}, "flop": 2e11, "total_ms": ms}
    if provider != FLOOR:
        fields |= {"forward_ms": [0.75 * x for x in ms], "backward_ms": [0.25 * x for x in ms]}
        names = {"logprobs": 2e-7, "dhidden": dx, "dweight": 3e-6}
        fields["errors"] = {name: {"max": x, "p999": x / 2} for name, x in names.items()}
    return record(
        "speed", changes.pop("op", "GRPO"), shape, "reasoning", provider, **(fields | changes)
    )


def memory(provider: str, size: int) -> Record:
    return record("memory", "GRPO", CPU, "reasoning", provider, extra_bytes=size)


def scaled(provider: str, axis: str, power: float) -> list[Record]:
    """Make scaling records with time ~ value ** power and constant memory."""
    return [
        record(
            "scaling",
            "GRPO",
            CPU_SMALL,
            "reasoning",
            provider,
            axis=axis,
            value=value,
            total_ms=[3 * value**power] * 3,
            extra_bytes=5_000_000,
        )
        for value in (64, 128, 512)
    ]


def make_run() -> Run:
    """Make a run: ours takes 1.1 floors, "fast" 0.9 of ours and more memory, "slow" the reverse."""
    ours = [1.1 * ms for ms in FLOOR_MS]
    records = [
        speed(FLOOR, FLOOR_MS),
        speed(OURS, ours),
        speed("slow", [2 * ms for ms in ours], dx=5e-7, version="1.2", package="slow-kernels"),
        speed("fast", [0.9 * ms for ms in ours], dx=2e-6),
        *(speed(name, [], status=status) for name, status in STATUSES.items()),
        memory(OURS, 50_000_000),
        memory("fast", 400_000_000),
        memory("slow", 20_000_000),
    ]
    for one in records:
        one["clock"] = {"before": {"clock_mhz": 2000.0}, "after": {"clock_mhz": 2400.0}}
    return {
        "machine": dict(MACHINE),
        "command": "python -m bench --shape cpu",
        "started": "2026-01-01T10:00:00+00:00",
        "finished": "2026-01-01T11:00:00+00:00",
        "records": records,
    }


def only(run: Run) -> figures.ShapeFigures:
    (group,) = figures.groups(run)
    return group


def save(run: Run, folder: Path) -> Path:
    results_file.save(copy.deepcopy(run), folder, done=run["finished"] is not None)
    return folder


def row_of(text: str, name: str) -> list[str]:
    """Return the cells of the one row of a markdown table with this name, bold or plain."""
    rows = [[cell.strip(" *") for cell in line.split(" | ")] for line in text.splitlines()]
    (cells,) = [row for row in rows if len(row) > 1 and row[1] == name]
    return cells


def test_exact_numbers_of_the_table() -> None:
    text = markdown(sections.full(only(make_run())))
    assert row_of(text, "slow (1.2)")[2:] == [
        *["440 (330-660)", "330", "110", "2.20", "2.00", "0.455", "45.5%", "2,327", "20.0 ▼"],
        *["2.0e-07", "1.0e-07", "5.0e-07 ▼", "3.0e-06 |"],
    ]
    assert row_of(text, OURS)[2:8] == ["220 (165-330)", "165", "55.0", "1.10", "", "0.909"]
    assert row_of(text, "fast")[5:7] == ["0.99", "0.90 ▼"]
    assert row_of(text, FLOOR)[2] == "200 (150-300)"
    assert f"**{OURS}** | **220 (165-330)**" in text
    order = [text.index(f"| {name}") for name in (FLOOR, "fast", f"**{OURS}**", "slow")]
    assert order == sorted(order)


@pytest.mark.parametrize(("provider", "status"), STATUSES.items(), ids=list(STATUSES))
def test_status_stands_in_place_of_figures(provider: str, status: str, tmp_path: Path) -> None:
    run = make_run()
    shown = " ".join(status.split())
    row = next(row for row in sections.full(only(run)).rows if str(row.cells[0]) == provider)
    assert (row.status, len(row.cells)) == (shown, 1)
    content = page.make(run)
    assert f"{provider} | {shown.replace('|', chr(92) + '|')} |" in page.as_markdown(content)
    assert f">{shown}</td>" in page.as_html(content, tmp_path)


def test_ratios_are_of_samples_of_the_same_round() -> None:
    run = make_run()
    assert only(run).find("GRPO", "slow").per_floor.median == pytest.approx(2.2)
    slow = next(one for one in run["records"] if one["provider"] == "slow")
    slow["total_ms"] = slow["total_ms"][::-1]  # the same median, in other rounds
    shuffled = only(run).find("GRPO", "slow")
    assert shuffled.total.median == pytest.approx(440)
    assert (shuffled.per_floor.low, shuffled.per_floor.high) == pytest.approx((1.375, 5.5))
    slow["total_ms"] = [300.0, 500.0]  # the shorter list: rounds 1 and 2
    assert only(run).find("GRPO", "slow").per_floor.median == pytest.approx((3 + 2.5) / 2)


def test_rounds_of_two_runs_are_not_paired() -> None:
    run = make_run()
    slow = next(one for one in run["records"] if one["provider"] == "slow")
    slow |= {"run": 1, "total_ms": [500.0, 600.0, 100.0]}
    slow = only(run).find("GRPO", "slow")
    assert (slow.per_floor.median, slow.per_floor.paired) == (500 / 200, False)
    assert row_of(markdown(sections.full(only(run))), "slow (1.2)")[5] == "≈ 2.50"


def test_losses_are_listed_and_nothing_else() -> None:
    run = make_run()
    losses_by_kind = losses([only(run)])
    assert {kind: [one.sentence for one in some] for kind, some in losses_by_kind.items()} == {
        "time": [
            "GRPO (cpu, reasoning): fast takes 198 ms against 220 ms: 0.90 of our time "
            "(quartiles 0.90-0.90)."
        ],
        "memory": [
            "GRPO (cpu, reasoning): slow holds 20.0 MB extra against 50.0 MB: 0.40 of ours."
        ],
        "accuracy": ["GRPO (cpu, reasoning): slow has an error of 5.0e-07 in dX against 1.0e-06."],
    }
    ours = next(one for one in run["records"] if one["provider"] == OURS)
    ours["total_ms"] = [1.3 * ms for ms in FLOOR_MS]
    assert [one.sentence for one in losses([only(run)])["target"]] == [
        "GRPO (cpu, reasoning): ours takes 1.30 of the floor (quartiles 1.30-1.30), target 1.15."
    ]
    ours["status"] = "failed: out of memory"
    missing = [one.sentence for one in losses([only(run)])["missing"]]
    assert missing[0].endswith("fast takes 198 ms, ours: failed: out of memory.")
    assert len(missing) == 2


def with_sketch(factor: float, size: int) -> Run:
    """Add our sketch, whose time is a factor of the floor's and whose error is large."""
    run = make_run()
    run["records"] += [
        speed(SKETCH, [factor * ms for ms in FLOOR_MS], dx=0.02),
        memory(SKETCH, size),
    ]
    return run


def test_our_sketch_is_shown_as_ours_and_is_no_peer() -> None:
    run = with_sketch(0.44, 30_000_000)
    text = markdown(sections.full(only(run)))
    assert f"**{SKETCH}** | **88.0 (66.0-132)**" in text
    assert row_of(text, SKETCH)[5:7] == ["0.44", "0.40"]
    exact, sketch = ([str(cell) for cell in row.cells] for row in sections.short(only(run)).rows)
    assert exact == ["GRPO", "220", "200", "1.10", "1.15", "fast", "198", "0.90 ▼", "50.0", "400"]
    assert sketch[:5] == ["GRPO, sketch", "88.0", "200", "0.44", "0.47"]
    assert sketch[5:] == ["fast", "198", "2.25", "30.0", "400"]
    assert losses([only(run)]).keys() == {"time", "memory", "accuracy"}
    sentences = [one.sentence for some in losses([only(run)]).values() for one in some]
    assert [text for text in sentences if "sketch" in text] == [
        "GRPO (cpu, reasoning): slow holds 20.0 MB extra against 30.0 MB: 0.67 of our sketch's."
    ]


def test_losses_of_our_sketch_to_peers_and_to_the_exact_gradient() -> None:
    run = with_sketch(1.25, 60_000_000)
    losses_by_kind = losses([only(run)])
    where = "GRPO (cpu, reasoning): "
    assert [one.sentence for one in losses_by_kind["target"]] == [
        f"{where}our sketch takes 1.25 of the floor (quartiles 1.25-1.25), target 0.47."
    ]
    assert [one.sentence for one in losses_by_kind["time"]] == [
        f"{where}fast takes 198 ms against 250 ms: 0.79 of our sketch's time "
        "(quartiles 0.79-0.79).",
        f"{where}{OURS} takes 220 ms against 250 ms: 0.88 of our sketch's time "
        "(quartiles 0.88-0.88).",
        f"{where}fast takes 198 ms against 220 ms: 0.90 of our time (quartiles 0.90-0.90).",
    ]
    (accuracy,) = losses_by_kind["accuracy"]
    assert "slow" in accuracy.sentence
    run["records"][-2]["status"] = "differs: x"
    (missing,) = losses([only(run)])["missing"]
    assert missing.sentence == f"{where}our sketch: differs: x."


def test_a_lead_within_the_noise_is_called_so() -> None:
    run = make_run()
    fast = next(one for one in run["records"] if one["provider"] == "fast")
    fast["total_ms"] = [0.9 * 110, 0.98 * 220, 1.2 * 440]
    assert "(quartiles 0.94-1.09, so it may be noise)" in losses([only(run)])["time"][0].sentence


def test_short_table() -> None:
    (row,) = sections.short(only(make_run())).rows
    assert [str(cell) for cell in row.cells] == [
        *["GRPO", "220", "200", "1.10", "1.15", "fast", "198", "0.90 ▼", "50.0", "400"]
    ]
    run = make_run()
    for one in run["records"]:
        one["shape"] = "cpu-small"  # targets are stated for "cpu" alone
    assert sections.short(only(run)).rows[0].cells[4].text == ""


def test_slopes_of_a_power_law() -> None:
    run = make_run()
    run["records"] += scaled(OURS, "N", 0.98) + scaled("slow", "N", 2.0)
    run["records"].append(
        run["records"][-1] | {"value": 1024, "status": "out of time", "total_ms": None}
    )
    ours, slow = next(iter(figures.scaling(run).values()))
    assert (ours.time_power, ours.memory_power) == pytest.approx((0.98, 0.0), abs=1e-9)
    assert slow.time_power == pytest.approx(2.0)
    (table,) = sections.scaling_tables(run)
    assert table.columns[1:] == ("N = 64", "N = 128", "N = 512", "N = 1,024", "fit")
    texts = [str(cell) for cell in table.rows[1].cells]
    assert texts[1] == "12,290 ms, 5.00 MB"
    assert texts[-2:] == ["out of time", "time ~ N^2.00, memory ~ N^0.00"]


def test_step_and_rows() -> None:
    run = make_run()
    step = {
        "step_ms": [400.0, 500.0, 1000.0],
        "head_ms": [100.0, 250.0, 100.0],
        "model": {"layers": 2},
    }
    run["records"] += [
        record("step", "GRPO", CPU, "reasoning", "slow", **step),
        record("step", "GRPO", CPU, "reasoning", "quack", status="not installed"),
        record(
            *("rows", "sweep", CPU, "reasoning", OURS),
            bytes=4e9,
            total_ms=[2000.0, 1000.0, 4000.0],
            copy_ms=[1000.0, 900.0, 1000.0],
        ),
    ]
    table, rows = sections.step_table(run), sections.rows_table(run)
    assert table is not None
    assert rows is not None
    texts = [str(cell) for cell in table.rows[0].cells]
    assert texts == ["slow", "500 (450-750)", "100 (100-175)", "25.0%"]
    assert table.rows[1].status == "not installed"
    assert table.notes == ("Model of GRPO, shape cpu: layers 2.",)
    texts = [str(cell) for cell in rows.rows[0].cells]
    assert texts == ["sweep", "4,000", "2,000 (1,500-3,000)", "2.00", "50.0%"]


def test_head_of_the_page() -> None:
    facts = dict(page.make(make_run()).facts)
    assert facts["machine"].startswith("Test CPU (2 cores), 2 threads, torch 2.13.0")
    assert (facts["rounds"], facts["clock"]) == ("3", "2,000 to 2,400 MHz")
    assert facts["finished"] == "2026-01-01T11:00:00+00:00"


def test_unfinished_run_says_so(tmp_path: Path) -> None:
    done, stopped = page.make(make_run()), page.make(make_run() | {"finished": None})
    for text in (page.as_markdown, lambda content: page.as_html(content, tmp_path)):
        assert "This run was stopped before it was done" in text(stopped)
        assert dict(stopped.facts)["finished"] == "stopped before it was done"
        assert "stopped before it was done" not in text(done)


def test_runs_of_two_machines_are_refused(tmp_path: Path) -> None:
    other = make_run()
    other["machine"]["device"] = "Another CPU"
    paths = [save(make_run(), tmp_path / "a"), save(other, tmp_path / "b")]
    with pytest.raises(ValueError, match="of one machine, got device Test CPU"):
        report.read(paths)


def test_merged_runs(tmp_path: Path) -> None:
    first, second = make_run(), make_run()
    second["machine"]["commit"] = "abcdef0123"
    second["records"] = [speed(OURS, [200.0, 400.0, 800.0])]
    second["finished"] = None
    run = report.read([save(first, tmp_path / "a"), save(second, tmp_path / "b") / "results.json"])
    case = only(run).find("GRPO", OURS)
    assert (case.total.median, case.per_floor.median, case.per_floor.paired) == (400, 2.0, False)
    assert run["finished"] is None
    assert dict(page.make(run).facts)["commits"] == "figures of several: 0123456, abcdef0"


@pytest.mark.parametrize(
    ("x", "text"),
    [
        *[(0.0, "0"), (2.5e-7, "2.5e-07"), (0.0123, "0.0123"), (1.0, "1.00"), (12.34, "12.3")],
        *[(99.97, "100"), (999.6, "1,000"), (2067.4, "2,067"), (37012.0, "37,010"), (None, "")],
    ],
)
def test_numbers(x: float | None, text: str) -> None:
    assert number(x) == text


def test_a_ratio_near_1_shows_its_side() -> None:
    assert [times(x) for x in (0.996, 1.0, 1.0049)] == ["0.996", "1.00", "1.005"]
