"""One process or many: the ranks of a run, and what they tell each other.

torchrun starts K processes and says so in the environment. Without it there is one process and no
process group. Every rank runs the same program; rank 0 writes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_train.errors import RankError

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)
"""Longest wait for the others: one may still generate, or wait for its verifier."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of them."""

    rank: int = 0
    size: int = 1
    launched: bool = False
    """By torchrun: there is a process group, and FSDP2 shards the models, be it over one rank."""

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> list[T]:
        """make() of every rank, in their order. What one of them raises stops all of them.

        Values travel by pickle. Raises: in one process what make raises, else RankError everywhere.
        """
        if self.size == 1:
            return [make()]
        value, error = None, None
        try:
            value = make()
        except Exception as caught:
            error = caught
        message = None if error is None else f"{type(error).__name__}: {error}"
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, (value, message))
        for rank, (_, failure) in enumerate(told):
            if failure is not None:
                raise RankError(f"rank {rank} stopped with {failure}") from error
        return [value for value, _ in told]

    def on_main(self, make: Callable[[], T]) -> T:
        """make() of rank 0, for all ranks."""
        return self.share(lambda: make() if self.main else None)[0]  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Whether it is set on some rank."""
        return flag if self.size == 1 else any(self.share(lambda: flag))

    def sum(self, values: dict[str, Tensor], largest: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Sums over ranks, in float64 on the CPU; of the names in `largest` the maximum.

        values: {name: [...]}; a name that a rank lacks counts as 0 there.
        """
        own = {name: value.detach().double().cpu() for name, value in values.items()}
        total: dict[str, Tensor] = {}
        for part in self.share(lambda: own):
            for name, value in part.items():
                if name not in total:
                    total[name] = value
                elif name in largest:
                    total[name] = torch.maximum(total[name], value)
                else:
                    total[name] = total[name] + value
        return total


ALONE = World()
"""One process, without a process group."""


@contextmanager
def connect(device: torch.device) -> Iterator[World]:
    """The world of this process; its process group lives as long as the block.

    device: of the models. Backends: gloo for CPU tensors and objects, NCCL for those of GPUs.
    """
    if "RANK" not in os.environ:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), launched=True)
    finally:
        dist.destroy_process_group()
