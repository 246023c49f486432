"""Fills uninitialised memory with NaN in these tests, so that an unwritten output shows."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Use one thread unless OMP_NUM_THREADS is set: tensors are tiny, threads would only wait."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """Make torch.empty and its relatives give NaN, as deterministic mode does by design.

    Operators without a deterministic form, as float sums along rows on a GPU, may run all the same.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
