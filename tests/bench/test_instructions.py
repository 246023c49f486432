"""Tests how times are predicted from a kernel's loop, and that the committed table is whole."""

import json

import pytest

from bench.instructions import OPERATIONS, RESULTS, Loop, bytes_of, markdown, saved
from bench.machine import one_line

pytest.importorskip("triton", reason="no Triton on this platform")
from tests.kernels import aot


def test_times_are_counts_over_rates() -> None:
    """2,048 rows of 152,064: 311e6 elements; 132 SMs at 1.75 GHz, 4.3 TB/s."""
    loop = Loop("sweep", 4, instructions=64, half_rate=8, mufu=1)
    elements = 2048 * 152_064
    assert loop.times_ms() == pytest.approx(
        {
            "bytes": elements * 4 / 4.3e12 * 1e3,
            "instructions": elements * 64 / (128 * 132 * 1.75e9) * 1e3,
            "half_rate": elements * 8 / (64 * 132 * 1.75e9) * 1e3,
            "mufu": elements * 1 / (16 * 132 * 1.75e9) * 1e3,
        }
    )
    assert loop.binds == "instructions"
    assert loop.ms == loop.times_ms()["instructions"]
    assert Loop("sweep", 4, instructions=8, half_rate=16, mufu=5).binds == "mufu"
    assert Loop("sweep", 12, instructions=8, half_rate=16, mufu=5).binds == "bytes"


def test_bytes_are_those_that_the_docstrings_of_rows_count() -> None:
    counted = {
        variant[0]: bytes_of(variant)
        for variant in aot.variants()
        if aot.logits_read(variant[0]) is not None
    }
    assert counted.keys() == saved(RESULTS).keys()
    names = ("sweep-None", "sweep-rkl", "jsd-jsd", "gradient-None-plain", "gradient-rkl-bf16")
    assert [counted[name] for name in names] == [4, 8, 8, 6, 10]
    names = ("gradient-rkl-fp32", "sketch-None", "sketch-rkl", "sketch-fkl")
    assert [counted[name] for name in names] == [12, 4, 4, 8]


def test_the_committed_table_is_that_of_the_numbers() -> None:
    table = saved(RESULTS)
    machine = json.loads((RESULTS / "instructions.json").read_text("utf-8"))["machine"]
    text = markdown(table, one_line(machine))
    assert (RESULTS / "instructions.md").read_text("utf-8") == f"{text}\n"
    assert {kernel for kernels in OPERATIONS.values() for kernel in kernels} <= table.keys()
