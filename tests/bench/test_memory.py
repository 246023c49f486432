"""Tests the memory records of bench/."""

import time
from typing import Any

import pytest

from bench.inputs import make_inputs
from bench.measures import memory
from bench.ops import OPS_BY_NAME, Op
from bench.providers import Provider
from bench.results_file import Record
from bench.shapes import TINY

GRPO = OPS_BY_NAME["GRPO"]
BYTES = {"extra_bytes": 7, "input_bytes": 5, "output_bytes": 3, "gradient_bytes": 2}


def _provider(name: str, **fields: Any) -> Provider:
    return Provider(name=name, **{"whole": lambda *_: {}, **fields})


GOOD, BROKEN, LAST = (_provider(name) for name in ("good", "broken", "last"))
ABSENT = _provider("absent", package="kdrl-no-such-package")
REFUSED = _provider("refused", refused={"GRPO": "its clip differs"})
PIECES = _provider("pieces", whole=None)


def _memory(deadline: float, *contestants: Provider) -> dict[str, Record]:
    pairs = [(one, {"rows": len(one.name)}) for one in contestants]
    all_records = list(memory.records(GRPO, TINY, "flat", pairs, deadline))
    assert [one["provider"] for one in all_records] == [one.name for one in contestants]
    for one in all_records:
        assert (one["kind"], one["op"], one["shape"]) == ("memory", "GRPO", "tiny")
        assert (one["profile"], one["setting"]) == ("flat", {"rows": len(one["provider"])})
        assert (one["status"] == "ok") == (BYTES.items() <= one.items())
        assert one["status"] == "ok" or not BYTES.keys() & one.keys()
    return {one["provider"]: one for one in all_records}


@pytest.mark.parametrize("op", memory.OPS, ids=lambda op: op.name)
def test_memory_counts_the_large_inputs(op: Op) -> None:
    """They are counted in float32, and ids in int64; N = 32, H = 64, V = 512, K = 64."""
    inputs = make_inputs(TINY, device="cpu", teachers=op.teachers)
    numbers = 32 * 64 + 512 * 64
    expected = 4 * numbers + 8 * 32
    if op.kd == "topk_rkl":
        expected += 32 * 64 * (8 + 4)
    elif op.kd:
        expected += 4 * numbers * op.teachers
    if op.adapter:
        expected += 4 * 16 * (64 + 512)
    assert sum(x.nbytes for x in memory.large_inputs(inputs, op)) == expected


def test_memory_statuses(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[Any, ...]] = []

    def measure(*case: Any) -> dict[str, int]:
        measured.append(case)
        if case[3] == "broken":
            raise RuntimeError("its process died\nand a trace")
        return dict(BYTES)

    monkeypatch.setattr(memory, "in_own_process", measure)
    records_by_name = _memory(time.monotonic() + 600, ABSENT, GOOD, REFUSED, BROKEN, PIECES, LAST)
    assert {name: one["status"] for name, one in records_by_name.items()} == {
        "absent": "not installed",
        "good": "ok",
        "refused": "not supported: its clip differs",
        "broken": "failed: RuntimeError: its process died",
        "pieces": "not supported: no policy gradient",
        "last": "ok",
    }
    assert measured == [
        (TINY, "flat", "GRPO", name, {"rows": len(name)}) for name in ("good", "broken", "last")
    ]


def test_memory_begins_nothing_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline, measured = time.monotonic() + 0.5, []

    def measure(*case: Any) -> dict[str, int]:
        measured.append(case[3])
        while time.monotonic() <= deadline:
            time.sleep(0.01)
        return dict(BYTES)

    monkeypatch.setattr(memory, "in_own_process", measure)
    records_by_name = _memory(deadline, GOOD, LAST, ABSENT, BROKEN)
    assert [one["status"] for one in records_by_name.values()] == [
        *["ok", "out of time"],
        *["not installed", "out of time"],  # a reason to be refused is no matter of time
    ]
    assert measured == ["good"]


def test_memory_in_this_process_is_that_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose allocator counts what is asked of it: no process is started."""
    inputs, called = make_inputs(TINY, device="cpu"), []

    def call(case: Any, _: Op, rows: int) -> dict[str, Any]:
        called.append((case is inputs, rows))
        return {"loss": case.hidden.sum() + case.weight.sum()}

    monkeypatch.setattr(memory, "in_own_process", None)
    monkeypatch.setattr(memory, "reset_peak", lambda: 100)
    monkeypatch.setattr(memory, "peak_bytes", lambda: 100 + 40_000 * 4)
    pairs = [(_provider("here", whole=call), {"rows": 3})]
    (one,) = memory.records(GRPO, TINY, "flat", pairs, time.monotonic() + 600, inputs)
    assert called == [(True, 3)] * 2, "once to warm up"
    gradients = 4 * (32 * 64 + 512 * 64)
    assert (one["status"], one["gradient_bytes"]) == ("ok", gradients)
    assert one["extra_bytes"] == 160_000 - gradients - 4
