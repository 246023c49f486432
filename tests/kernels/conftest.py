"""Uninitialised memory is NaN in these tests, so that an unwritten output shows."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tensors here are tiny: more threads only wait for each other, unless OMP_NUM_THREADS asks."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """torch.empty and its relatives give NaN (what deterministic mode does, by design)."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
