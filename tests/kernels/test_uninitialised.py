"""Tests the fixture that fills uninitialised memory with NaN: it refuses no operator."""

import torch


def test_memory_is_nan_and_no_operator_is_refused() -> None:
    """put_ has no deterministic form on a CPU either, as cumsum has none on a GPU."""
    assert torch.empty(3).isnan().all()
    index = torch.tensor([1])
    assert torch.zeros(3).put_(index, torch.ones(1)).tolist() == [0.0, 1.0, 0.0]
