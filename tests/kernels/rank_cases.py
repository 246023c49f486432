"""Runs cases on several ranks of gloo on a CPU, and tells what became of each."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from tests.interpreter import search_once_a_launch

CasesOf = Callable[[int], Mapping[str, Callable[[], None]]]
"""Gives the cases by name, for a number of ranks. A function of a module: each rank calls it."""


def run_cases(cases_of: CasesOf, ranks: int, folder: Path, deadline_s: float) -> Path:
    """Run every case on all ranks, and return the folder of outcomes; end processes that hang.

    The ranks are forked from the process that forks the trainer's in other tests: a start of their
    own would import torch once more on each.
    """
    from tests.train.ranks import on_processes  # noqa: PLC0415 (transformers: seconds)

    on_processes(ranks, partial(_rank, cases_of, ranks, folder, deadline_s), deadline_s)
    return folder


def _rank(cases_of: CasesOf, ranks: int, folder: Path, deadline_s: float, rank: int) -> None:
    """Run every case in this process, and write what failed to a file."""
    search_once_a_launch()
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
