"""Tests the bench of a vocabulary over two processes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.inputs import Inputs, make_inputs
from bench.measures import vocab_ranks
from bench.ops import OPS_BY_NAME
from bench.shapes import TINY

GRPO = OPS_BY_NAME["GRPO"]


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(TINY, device="cpu")


def test_the_halves_are_the_whole(inputs: Inputs) -> None:
    parts = [vocab_ranks.half(inputs, rank) for rank in range(2)]
    for name in ("weight", "teacher_weight"):
        whole = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(whole, getattr(inputs, name))
        assert all(getattr(part, f"shared_{name}") is getattr(part, name) for part in parts)
    assert parts[0].hidden is not inputs.hidden


def test_heads_that_are_not_alike_are_refused() -> None:
    odd = make_inputs(replace(TINY, V=513, V_t=513), device="cpu")
    with pytest.raises(ValueError, match="V and V_t must be equal and even, got 513 and 513"):
        vocab_ranks.half(odd, 0)


def test_another_gradient_is_seen(inputs: Inputs) -> None:
    part = vocab_ranks.half(inputs, 1)
    vocab_ranks.call(inputs, GRPO)
    assert inputs.weight.grad is not None
    part.hidden.grad = inputs.hidden.grad
    part.weight.grad = inputs.weight.grad[256:].clone()
    assert vocab_ranks.errors(part, inputs, 1) == {"dhidden": 0, "dweight": 0}
    part.weight.grad[7] += 0.1 * inputs.weight.grad[256:].abs().max()
    assert vocab_ranks.errors(part, inputs, 1)["dweight"] == pytest.approx(0.1, rel=1e-3)


def test_table() -> None:
    """Half of the FLOP in 60% of the time: 1.2 of the time for each."""
    errors = {"dhidden": 1e-7, "dweight": 2e-7}
    row: dict[str, Any] = {"op": "GRPO", "errors": errors, "alone_ms": [1000.0, 2000.0, 1500.0]}
    row["together_ms"] = [600.0, 1000.0, 1050.0]
    machine = {"device": "Test CPU", "threads": 1, "torch": "2", "triton": "3", "python": "3.11"}
    machine |= {"commit": "0" * 9, "uncommitted": ""}
    late = row | {"op": "KDRL exact", "alone_ms": [], "together_ms": []}
    record = {"shape": "x", "machine": machine, "command": "c", "rows": [late, row]}
    text = vocab_ranks.table(record)
    assert text.splitlines()[-2] == "| KDRL exact |  |  | out of time | 1.0e-07 | 2.0e-07 |"
    assert (
        text.splitlines()[-1] == "| GRPO | 1,500 | 1,000 | 1.20 (1.10-1.30) | 1.0e-07 | 2.0e-07 |"
    )


@pytest.mark.slow  # two processes that import torch
def test_both_ways_give_the_same_gradients(tmp_path: Path) -> None:
    vocab_ranks.main(["--out", str(tmp_path), "--shape", "tiny", "--rounds", "2"])
    text = (tmp_path / "vocab-ranks-tiny.md").read_text("utf-8")
    assert "--out DIR --shape tiny" in text
    assert [line.split(" | ")[0] for line in text.splitlines()[-2:]] == ["| GRPO", "| KDRL exact"]
    assert str(tmp_path) not in (tmp_path / "vocab-ranks-tiny.json").read_text("utf-8")
