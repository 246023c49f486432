"""Uninitialised memory is NaN in these tests, so that an unwritten output shows."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tensors here are tiny: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """torch.empty and its relatives give NaN (what deterministic mode does, by design)."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
