"""The ranks of a run, one process or many, and how they exchange values.

torchrun starts several processes and tells each its rank through the environment. Without torchrun
there is one process and no process group. Every rank runs the same program; only rank 0 writes.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_train.copies import to_host
from kdrl_train.errors import RankError, describe
from kdrl_train.regroup import Meeting
from kdrl_train.watch import RanksConfig, Watch

T = TypeVar("T")
BACKSTOP = timedelta(days=7)
"""The timeout of collectives. A `Watch` ends a run long before: it knows whether the ranks that are
waited for move, as in a long rollout, or are stuck."""


@dataclass(frozen=True, slots=True)
class World:
    """Describes this process among all processes of the run."""

    rank: int = 0
    size: int = 1
    launched: bool = False
    """Whether torchrun started it: then there is a process group, and FSDP2 shards the models, even
    over a single rank."""
    watch: Watch | None = None
    """With several ranks."""
    meeting: Meeting | None = None
    """Where several ranks meet after an error."""
    tensor: int = 1
    """model.tensor_parallel: so many neighbouring ranks have the same packs; it divides `size`."""

    @property
    def main(self) -> bool:
        """Say whether this is the rank that writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """The number of this rank's packs among data_size."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        """The number of ranks whose packs differ."""
        return self.size // self.tensor

    def share(self, make: Callable[[], T]) -> list[T]:
        """Call make() on every rank and return all values, in the order of the ranks.

        Values are sent by pickle, which is safe: all ranks are processes of this run. All ranks
        must call this together.

        Raises: RankError on all ranks if make() fails on one; with a single rank, its own error.
        """
        if self.size == 1:
            return [make()]
        value, error = None, None
        try:
            value = make()
        except Exception as caught:
            error = caught
        message = None if error is None else describe(error)
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, (value, message))
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise RankError(f"rank {rank} stopped with {failure}") from error
        return [value for value, _ in outcomes]

    def share_packs(self, make: Callable[[], T]) -> list[T]:
        """Call make(), which computes from this rank's packs, on every rank.

        Returns: data_size values: one of the ranks that have the same packs, whose values are the
            same.
        """
        return self.share(make)[:: self.tensor]

    def on_main(self, make: Callable[[], T]) -> T:
        """Call make() on rank 0 alone and return its value on all ranks."""
        return self.share(lambda: make() if self.main else None)[0]  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Say whether `flag` is true on some rank."""
        return flag if self.size == 1 else any(self.share(lambda: flag))

    def sum(self, values: dict[str, Tensor], largest: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Add up tensors over the ranks, in float64 on the CPU; those of the same packs count once.

        Args:
            values: one tensor for each name; a name that a rank lacks counts as 0 there.
            largest: names whose maximum is taken instead of their sum.
        """
        copies = to_host({name: value.detach().double() for name, value in values.items()})
        total: dict[str, Tensor] = {}
        for part in self.share_packs(lambda: copies):
            for name, value in part.items():
                join = torch.maximum if name in largest else torch.add
                total[name] = join(total[name], value) if name in total else value
        return total


ALONE = World()
"""The world of a single process, without a process group."""


def fresh(store: Any, rank: int, size: int, timeout_s: float) -> Any:
    """Return a part of a store to which no earlier start of these ranks has written.

    torchrun --max-restarts keeps its store, with the addresses of processes that are gone, and the
    numbers of restarts of its nodes differ. So rank 0 names the part, and answers by their own
    names, which are new, those that are here.

    Raises: RankError for a rank that is not here in time; RuntimeError where rank 0 is not.
    """
    name = uuid4().hex
    if rank > 0:
        store.set(f"here/{rank}", name)
        name = store.get(f"part/{name}").decode()  # waits
        store.set(f"ready/{name}/{rank}", "")
    deadline, missing = time.monotonic() + timeout_s, list(range(1, size) if rank == 0 else ())
    while missing:
        for other in missing:
            if store.check([f"here/{other}"]):
                store.set(f"part/{store.get(f'here/{other}').decode()}", name)
        missing = [other for other in missing if not store.check([f"ready/{name}/{other}"])]
        if missing and time.monotonic() > deadline:
            raise RankError(
                f"each rank must start within ranks.start_timeout_s = {timeout_s:g} s, got no sign "
                f"of rank {missing[0]}: see what its process prints"
            )
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


@contextmanager
def connect(
    device: torch.device,
    config: RanksConfig | None = None,
    folder: Path = Path(),
    tensor: int = 1,
) -> Iterator[World]:
    """Yield the world of this process; its process group exists as long as the block.

    Args:
        device: where the models are. gloo carries CPU tensors and objects, NCCL those of GPUs.
        config: how long to wait for a rank that is stuck.
        folder: the run folder, for `Watch`.
        tensor: model.tensor_parallel.
    Raises: ValueError where it does not divide the number of ranks.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if ranks % tensor:
        raise ValueError(
            f"model.tensor_parallel must divide the number of ranks, got {tensor} with {ranks}: "
            "start as many, or a multiple, with torchrun"
        )
    if "RANK" not in os.environ:
        yield ALONE
        return
    config = config or RanksConfig()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    start = timedelta(seconds=config.start_timeout_s)
    store, rank, size = next(dist.rendezvous("env://", timeout=start))
    store = fresh(store, rank, size, config.start_timeout_s)
    watch = meeting = None
    if size > 1:
        meeting = Meeting(rank, size, store.clone(), aborts=device.type == "cuda")
        watch = Watch(rank, size, dist.PrefixStore("watch", store.clone()), config, folder)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=BACKSTOP)
    try:
        yield World(rank, size, launched=True, watch=watch, meeting=meeting, tensor=tensor)
    except Exception as error:
        if watch is not None and watch.verdict:  # another rank has ended, and with it the group
            raise RankError(watch.verdict) from error
        raise
    finally:
        if watch is not None:
            watch.close()
        if meeting is not None:
            meeting.close()
        if dist.is_initialized():  # not where the ranks could not meet again
            dist.destroy_process_group()
