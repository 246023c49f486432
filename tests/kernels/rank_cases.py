"""Runs cases on several ranks of gloo on a CPU, and tells what became of each."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

CasesOf = Callable[[int], Mapping[str, Callable[[], None]]]
"""Gives the cases by name, for a number of ranks. A function of a module: each rank calls it."""


def run_cases(cases_of: CasesOf, ranks: int, folder: Path, deadline_s: float) -> Path:
    """Run every case on all ranks, and return the folder of outcomes; end processes that hang."""
    arguments = (cases_of, ranks, folder, deadline_s)
    processes = torch.multiprocessing.spawn(_rank, arguments, nprocs=ranks, join=False)
    end = time.monotonic() + deadline_s
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < end, f"{ranks} ranks took longer than {deadline_s} s"
    finally:
        for process in processes.processes:
            process.kill()
    return folder


def _rank(rank: int, cases_of: CasesOf, ranks: int, folder: Path, deadline_s: float) -> None:
    """Run every case in this process, and write what failed to a file."""
    torch.set_num_threads(1)
    store, deadline = f"file://{folder / 'store'}", timedelta(seconds=deadline_s)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=ranks, timeout=deadline
    )
    for name, check in cases_of(ranks).items():
        try:
            check()
            outcome = "ok"
        except Exception as error:  # the other ranks go on too
            outcome = f"{type(error).__name__}: {error}"
        (folder / f"{name}-{rank}").write_text(outcome, encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


def assert_ok(folder: Path, name: str, ranks: int) -> None:
    """Check that a case failed on no rank."""
    texts = [(folder / f"{name}-{rank}").read_text(encoding="utf-8") for rank in range(ranks)]
    assert texts == ["ok"] * ranks
