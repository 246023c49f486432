"""Rows per chunk: within the budget, balanced, at least one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdrl_kernels.plan import rows_per_chunk

CPU, GPU_LIKE = torch.device("cpu"), torch.device("xpu")


@given(
    N=st.integers(0, 5000),
    V=st.integers(1, 200_000),
    streams=st.integers(1, 2),
    block_rows=st.integers(0, 64),
    budget_rows=st.integers(8, 4000),
)
def test_budget_holds(N: int, V: int, streams: int, block_rows: int, budget_rows: int) -> None:
    budget = budget_rows * V * 4
    buffers = 6 if block_rows else 0
    rows = rows_per_chunk(
        N, V, streams=streams, dtype=torch.float32, device=CPU, block_rows=block_rows,
        block_buffers=buffers, workspace_bytes=budget,
    )  # fmt: skip
    assert rows >= 1
    assert (rows * streams + min(rows, block_rows) * buffers) * V * 4 <= budget
    if rows < N:
        chunks = -(-N // rows)
        assert rows * chunks - N < chunks  # the last chunk is short by less than one row a chunk


def test_default_is_2048_rows_at_the_reference_shape() -> None:
    options = {"dtype": torch.float32, "device": GPU_LIKE}
    assert rows_per_chunk(16_384, 152_064, streams=1, **options) == 2048
    assert rows_per_chunk(16_384, 152_064, streams=2, **options) == 2048
    assert rows_per_chunk(16_384, 256_000, streams=1, **options) == 2048


def test_too_small_a_budget_says_what_one_row_needs() -> None:
    with pytest.raises(ValueError, match="workspace_bytes must be at least 1216512"):
        rows_per_chunk(
            8, 152_064, streams=2, dtype=torch.float32, device=CPU, workspace_bytes=1_000_000
        )
