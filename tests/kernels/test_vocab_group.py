"""A vocabulary over 2 or 3 ranks gives one process's numbers, the same bits on every rank."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.kernels import vocab_rules, vocab_values
from tests.kernels.vocab_ranks import SIZES

DEADLINE_S = 300
CASES = vocab_values.CASES | vocab_rules.CASES


def _rank(rank: int, folder: Path, world_size: int) -> None:
    """Run every case in this process, and write what failed to a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    store = f"file://{folder / 'store'}"
    deadline = timedelta(seconds=DEADLINE_S)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=deadline
    )
    for name, check in CASES.items():
        try:
            check()
            outcome = "ok"
        except Exception as error:  # the other ranks go on too
            outcome = f"{type(error).__name__}: {error}"
        (folder / f"{name}-{rank}").write_text(outcome, encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=SIZES, ids="{} ranks".format)
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """Return the folder to which all ranks wrote, and their number; end processes that hang."""
    folder = tmp_path_factory.mktemp("ranks")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    ranks = torch.multiprocessing.spawn(
        _rank, (folder, request.param), nprocs=request.param, join=False
    )
    end = time.monotonic() + DEADLINE_S
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < end, f"the ranks took longer than {DEADLINE_S} s"
    finally:
        for process in ranks.processes:
            process.kill()
    return folder, request.param


@pytest.mark.parametrize("case", CASES)
def test_ranks(case: str, outcomes: tuple[Path, int]) -> None:
    folder, ranks = outcomes
    texts = [(folder / f"{case}-{rank}").read_text(encoding="utf-8") for rank in range(ranks)]
    assert texts == ["ok"] * ranks
