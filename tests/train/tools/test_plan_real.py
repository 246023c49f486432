"""plan against real runs: memory within a quarter of what they take."""

import platform
from pathlib import Path

import pytest

from bench.measures.plan import RUNS, compare


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="the peak of a process is read on Linux")
@pytest.mark.parametrize("name", RUNS)
def test_memory_is_predicted_within_a_quarter(name: str, tmp_path: Path) -> None:
    comparison = compare(name, tmp_path)
    assert 0.75 < comparison["predicted_over_measured"] < 1.25, comparison
