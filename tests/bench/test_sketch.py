"""Tests the bench of the sketch and its prediction on tiny sizes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kdrl_kernels as kk
from bench.inputs import Inputs, make_inputs
from bench.measures import memory, predict, sketch
from bench.ops import OPS_BY_NAME
from bench.shapes import TINY
from tests.bench.test_measures import (
    GRPO,
    KDRL,
    ROUNDS,
    later,
)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(TINY)


def test_sketch_rows(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {name: 1_500_000 * n for n, name in enumerate(sketch.GRADIENTS, 1)}
    monkeypatch.setattr(memory, "alone", lambda *_: sizes)
    row = sketch.add_memory(sketch.measure(KDRL, inputs), KDRL, inputs)
    row = sketch.add_times(row, KDRL, inputs, ROUNDS, later())
    cases = row["cases"]
    assert list(cases) == [*sketch.GRADIENTS, sketch.ROUNDED, sketch.BARE]
    assert cases[sketch.BARE]["ratio"] == 1
    exact, rounded = (cases[name]["errors"]["dhidden"] for name in ("exact", sketch.ROUNDED))
    assert exact < 1e-5
    assert 1e-3 < rounded < 3e-2
    for name, one in sketch.GRADIENTS.items():
        assert cases[name]["ms"] > 0
        assert cases[name]["ratio"] > 0
        assert cases[name]["extra_bytes"] == sizes[name]
        if one is not None:
            share = 1 - cases[name]["flat_rows"]
            assert 0 < share <= 1
            assert share <= cases[name]["entries"] <= share * (1 / one.threshold + 2)
            assert 0 <= cases[name]["predicted"] < 2


def test_counts_alone(tmp_path: Path) -> None:
    """A finer threshold has more entries or more flat rows, and a smaller error."""
    sketch.count(TINY, ["rl"], [KDRL], tmp_path)
    (row,) = json.loads((tmp_path / "counts-tiny.json").read_text())["rows"]
    assert list(row["cases"]) == [*sketch.COUNTED, sketch.ROUNDED]
    coarse, fine = row["cases"]["5e-3"], row["cases"]["2e-4"]
    assert coarse["errors"]["dhidden"] > 2 * fine["errors"]["dhidden"]
    assert (coarse["flat_rows"], coarse["entries"]) < (fine["flat_rows"], fine["entries"])
    assert (tmp_path / "counts-tiny.md").read_text().count("| KDRL exact | rl | ") == 9


def test_a_memory_that_is_not_measured_costs_no_time(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise RuntimeError("its process died")

    monkeypatch.setattr(memory, "alone", dies)
    row = sketch.add_memory(sketch.measure(GRPO, inputs), GRPO, inputs)
    row = sketch.add_times(row, GRPO, inputs, ROUNDS, later())
    assert row["memory"] == "its process died"
    assert "extra_bytes" not in row["cases"]["exact"]
    assert row["cases"]["exact"]["ms"] > 0


def test_entries_of_linear_logprobs_are_those_that_are_told(inputs: Inputs) -> None:
    """Two sketches that differ in an entry would differ by percents."""
    half = kk.Sketch(threshold=2**-3)
    sketch.gradients(inputs, OPS_BY_NAME["cross entropy"], half)
    dx = inputs.hidden.grad
    inputs.hidden.grad = None
    told = sketch.same_entries(inputs, half)
    told.loss.backward()
    assert torch.allclose(inputs.hidden.grad, dx, rtol=1e-4, atol=1e-6)


def sketch_record() -> dict[str, Any]:
    """Make the record of a run by hand."""
    error = {"dhidden": 0.02, "dweight": 0.03}
    cases = {
        "exact": {"errors": error, "ms": 2000.4, "ratio": 1.1, "extra_bytes": 134_000_000},
        "2e-3": {"errors": error, "ms": 800.0, "ratio": 0.44, "entries": 9.96, "flat_rows": 0.125},
        "5e-4": {"errors": error, "entries": 12},
        sketch.ROUNDED: {"errors": error},
        sketch.BARE: {"ms": 1800.0, "ratio": 1.0},
    }
    rows = [{"op": op, "profile": "flat", "cases": cases} for op in ("GRPO", "KDRL exact")]
    machine = {"device": "Test CPU", "threads": 2, "torch": "2", "triton": "3", "python": "3.11"}
    return {"machine": machine | {"commit": "0" * 9, "uncommitted": ""}, "shape": "x", "rows": rows}


def test_sketch_table_and_plot(tmp_path: Path) -> None:
    sketch.write(sketch_record(), tmp_path)
    lines = (tmp_path / "sketch-x.md").read_text().splitlines()
    assert {line.count("|") for line in lines[2:]} == {11}
    assert lines[4:9] == [
        "| GRPO | flat | exact | 2,000 | 1.10 | 134.0 |  |  | 2.0e-02 | 3.0e-02 |",
        "| GRPO | flat | 2e-3 | 800 | 0.44 |  | 10.0 | 12.5% | 2.0e-02 | 3.0e-02 |",
        "| GRPO | flat | 5e-4 |  |  |  | 12.0 |  | 2.0e-02 | 3.0e-02 |",
        "| GRPO | flat | bfloat16 operands |  |  |  |  |  | 2.0e-02 | 3.0e-02 |",
        "| GRPO | flat | bare GEMMs | 1,800 | 1.00 |  |  |  |  |  |",
    ]
    assert json.loads((tmp_path / "sketch-x.json").read_text()) == sketch_record()
    pytest.importorskip("matplotlib")
    assert (tmp_path / "sketch-x.png").read_bytes().startswith(b"\x89PNG")


def test_prediction_at_round_rates() -> None:
    """By hand: u = 17.86 TFLOP, a row of logits 608 kB; an entry moves 2 rows of 3,584 numbers."""
    exact = predict.line(GRPO, 1000, 1, ["exact"], 0, 0)
    u = 2 * 16384 * 3584 * 152_064 / 1e12
    reads = 16384 * 152_064 * 4 / 1e9
    assert exact.split(" | ")[2] == f"{3 * u:.1f}"
    assert exact.split(" | ")[3] == f"{2.5 * reads:.1f}"  # read twice, written in bfloat16
    assert exact.split(" | ")[4] == "0.0"
    sketched = predict.line(GRPO, 1000, 1, ["5e-4"], 100, 0.25)
    products = 2 * 3584 * (16384 + 152_064 + 2 * 100 * 16384) / 1e9
    row_work = 2.125 * reads  # a quarter of the rows has a dense dz
    sums = (1.5 * u, row_work, products, 1.5 * u + row_work + products)
    assert sketched.split(" | ")[2:] == [*(f"{ms:.1f}" for ms in sums[:3]), f"{sums[3]:.1f} |"]


def test_times_and_errors_of_some_operations_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "alone", None)
    monkeypatch.setattr(sketch, "write", sketch.save)  # without the plot
    typed = ["--out", str(tmp_path), "--shape", "tiny", "--profiles", "reasoning", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", ["sketch", *typed, "--ops", "GRPO", "--no-memory"])
    monkeypatch.setattr(sketch, "set_up_cpu", lambda: None)
    sketch.main()
    (row,) = json.loads((tmp_path / "sketch-tiny.json").read_text())["rows"]
    assert (row["op"], row["profile"]) == ("GRPO", "reasoning")
    for name in sketch.GRADIENTS:
        assert {"errors", "ms", "status"} <= row["cases"][name].keys()
        assert "extra_bytes" not in row["cases"][name]


def test_short_times_have_three_digits() -> None:
    record = sketch_record()
    record["rows"][0]["cases"]["exact"]["ms"] = 33.456
    assert "| exact | 33.5 |" in sketch.table(record["rows"])
