"""Lets the ranks of a run meet again after an error on one of them.

The others wait for it in a collective. So it writes its error into the store that torchrun keeps
and leaves the process groups, which closes its connections: the others' collectives fail too. NCCL
waits on; there a thread of each rank looks into the store, and aborts (not run yet). All meet in
the store, then in a new group over gloo, where they can save what they agree on.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from kdrl_train.errors import RankError, describe

MEET_S = 20.0
"""Seconds to wait for a rank: less than the 30 s after which torchrun kills. Ranks work for so long
without a collective only where they share the outcome, as in a rollout, and so fail together."""
LOOK_S = 1.0
"""Seconds between two looks of the thread into the store."""
FIRST = "first"
"""The key of the error that came first: in words, and with its rank."""
TAG = 1_000_003
"""Of a message that nobody sends."""


class Meeting:
    """Holds, on one rank, what the ranks need to meet again.

    Args:
        store: of torch.distributed; all ranks see it.
        aborts: whether a thread aborts what this rank waits for, once another has failed.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, aborts: bool) -> None:
        self.rank, self.size = rank, size
        self._store = dist.PrefixStore("meeting", store)
        self._over = threading.Event()
        self._leaving = threading.Lock()
        if aborts:
            threading.Thread(target=self._look, name="meeting", daemon=True).start()

    def hold(self, error: Exception) -> tuple[Exception, bool]:
        """Leave the process groups and join the other ranks in a new one. All ranks call it, once,
        each with the error that it met.

        Returns: the error that came first, a RankError where it was on another rank; and whether
            all ranks have come. If not, it names those that have not, and there is no group.
        """
        text = describe(error)
        of_rank = error if isinstance(error, RankError) else f"rank {self.rank} stopped with {text}"
        mine = json.dumps([text, str(of_rank)])
        try:
            first, first_of_rank = json.loads(self._store.compare_set(FIRST, "", mine))
        except dist.DistNetworkError:
            message = (
                f"the process that keeps the ranks' store, rank 0 say, is gone; then {of_rank}"
            )
            return RankError(message), False
        if first != text:
            error = RankError(first_of_rank)
        self._leave()
        self._over.set()
        keys = [str(rank) for rank in range(self.size)]
        self._store.set(str(self.rank), "here")
        try:
            self._store.wait(keys, timedelta(seconds=MEET_S))
        except dist.DistStoreError:
            lost = [key for key in keys if not self._store.check([key])]
            message = (
                f"rank {' and '.join(lost)} must answer, got nothing for {MEET_S:g} s: it was "
                f"killed, for its memory say, or is stuck. Then {first_of_rank}"
            )
            return RankError(message), False
        dist.init_process_group("gloo", store=self._store, rank=self.rank, world_size=self.size)
        return error, True

    def close(self) -> None:
        """End the thread."""
        self._over.set()

    def _leave(self) -> None:
        """Leave all process groups, unless that was done.

        NCCL is aborted. gloo cannot be, and models hold its groups; but it closes a connection once
        a message is late.
        """
        with self._leaving:
            if not dist.is_initialized():
                return
            for group in [*c10d._world.pg_map]:
                for other in set(range(group.size())) - {group.rank()}:
                    with suppress(RuntimeError):  # it is late, or closed, or not gloo's
                        message = group.recv([torch.empty(1)], other, TAG)
                        message.wait(timedelta(milliseconds=1))
            c10d._abort_process_group()

    def _look(self) -> None:
        """Abort the process groups once another rank has failed."""
        while not self._over.wait(LOOK_S):
            if self._store.check([FIRST]):
                self._leave()
                return


@contextmanager
def first_cause(meeting: Meeting | None) -> Iterator[None]:
    """Raise, for an error of the block, the one that came first on any rank."""
    try:
        yield
    except Exception as error:
        first = error if meeting is None else meeting.hold(error)[0]
        if first is error:
            raise
        raise first from error
