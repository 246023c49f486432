"""A vocabulary over 2 or 3 ranks gives one process's numbers, the same bits on every rank."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.kernels import vocab_ids, vocab_rules, vocab_values
from tests.kernels.vocab_ranks import SIZES

DEADLINE_S = 300
CASES = vocab_values.CASES | vocab_ids.CASES | vocab_rules.CASES
CASES_OF = {ranks: [case for case in CASES if ranks == 2 or "float" not in case] for ranks in SIZES}
"""The names of what so many ranks run: one group is enough for the dtypes."""


def _rank(rank: int, folder: Path, world_size: int) -> None:
    """Run every case in this process, and write what failed to a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    store = f"file://{folder / 'store'}"
    deadline = timedelta(seconds=DEADLINE_S)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=deadline
    )
    for name in CASES_OF[world_size]:
        try:
            CASES[name]()
            outcome = "ok"
        except Exception as error:  # the other ranks go on too
            outcome = f"{type(error).__name__}: {error}"
        (folder / f"{name}-{rank}").write_text(outcome, encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that runs all cases of so many ranks, and tells the folder of outcomes."""

    @cache
    def run(world_size: int) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        os.environ.setdefault("TRITON_INTERPRET", "1")
        ranks = torch.multiprocessing.spawn(
            _rank, (folder, world_size), nprocs=world_size, join=False
        )
        end = time.monotonic() + DEADLINE_S
        try:
            while not ranks.join(timeout=1):
                assert time.monotonic() < end, f"the ranks took longer than {DEADLINE_S} s"
        finally:
            for process in ranks.processes:
                process.kill()
        return folder

    return run


@pytest.mark.parametrize(
    ("ranks", "case"), [(ranks, case) for ranks in SIZES for case in CASES_OF[ranks]]
)
def test_ranks(ranks: int, case: str, folder_of: Callable[[int], Path]) -> None:
    folder = folder_of(ranks)
    texts = [(folder / f"{case}-{rank}").read_text(encoding="utf-8") for rank in range(ranks)]
    assert texts == ["ok"] * ranks
