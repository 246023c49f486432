"""A vocabulary over 2 or 3 ranks gives one process's numbers, the same bits on every rank."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.kernels import vocab_ids, vocab_rules, vocab_values
from tests.kernels.rank_cases import assert_ok, run_cases
from tests.kernels.vocab_ranks import SIZES

DEADLINE_S = 300
CASES = vocab_values.CASES | vocab_ids.CASES | vocab_rules.CASES
CASES_OF = {ranks: [case for case in CASES if ranks == 2 or "float" not in case] for ranks in SIZES}
"""The names of what so many ranks run: one group is enough for the dtypes."""


def _cases(ranks: int) -> dict[str, Callable[[], None]]:
    torch.use_deterministic_algorithms(True)
    return {name: CASES[name] for name in CASES_OF[ranks]}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that runs all cases of so many ranks, and tells the folder of outcomes."""

    @cache
    def run(ranks: int) -> Path:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        return run_cases(_cases, ranks, tmp_path_factory.mktemp("ranks"), DEADLINE_S)

    return run


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        pytest.param(ranks, case, marks=[pytest.mark.slow] if ranks > 2 else [])
        for ranks in SIZES
        for case in CASES_OF[ranks]
    ],
)
def test_ranks(ranks: int, case: str, folder_of: Callable[[int], Path]) -> None:
    assert_ok(folder_of(ranks), case, ranks)
