"""Ranks exchange values and errors."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kdrl_train.errors import RankError
from kdrl_train.ranks import ALONE, World, connect, fresh
from tests.train.ranks import on_ranks


def test_one_process_needs_no_group() -> None:
    with connect(torch.device("cpu")) as world:
        assert world is ALONE
        assert (world.rank, world.size, world.launched, world.main) == (0, 1, False, True)
        assert world.share(lambda: 3) == [3]
        assert world.on_main(lambda: 4) == 4
        assert world.any(True)
        assert not world.any(False)
        total = world.sum({"a": torch.tensor([1.5, 2.0])})
        assert total["a"].dtype == torch.float64
        assert total["a"].tolist() == [1.5, 2.0]
        with pytest.raises(KeyError):
            world.share(lambda: {}["missing"])


def _talk(world: World) -> list[Any]:
    rank = world.rank
    values = {"sum": torch.tensor(10.0**rank), "most": torch.tensor(5.0 - rank)}
    total = world.sum(values | ({"last": torch.tensor([1.0])} if rank == 2 else {}), ("most",))
    return [
        world.share(lambda: rank * rank),
        world.on_main(lambda: f"of rank {rank}"),
        world.any(rank == 1),
        world.any(False),
        {name: value.tolist() for name, value in total.items()},
        os.environ["LOCAL_RANK"],
    ]


@pytest.mark.slow  # test_two_ranks.py has two ranks
def test_three_ranks_agree() -> None:
    for rank, (squares, main, some, none, total, local) in enumerate(on_ranks(3, _talk)):
        assert squares == [0, 1, 4]
        assert main == "of rank 0"
        assert (some, none) == (True, False)
        assert total == {"sum": 111.0, "most": 5.0, "last": [1.0]}
        assert local == str(rank)


@pytest.mark.fault("restart")
def test_a_restart_reads_nothing_of_the_start_before() -> None:
    """torchrun's store keeps what ranks that are gone have written."""
    store = dist.HashStore()
    for _ in range(2):
        with ThreadPoolExecutor(3) as threads:
            parts = list(threads.map(lambda rank: fresh(store, rank, 3, 10.0), range(3)))
        assert not parts[0].check(["address"])
        parts[1].set("address", "of rank 1")
        assert [part.get("address") for part in parts] == [b"of rank 1"] * 3
    message = "within ranks.start_timeout_s = 0.1 s, got no sign of rank 1"
    with pytest.raises(RankError, match=message):
        fresh(store, 0, 3, 0.1)


def _fail(world: World) -> None:
    def make() -> None:
        if world.rank == 1:
            raise OSError("no space")

    world.share(make)


def test_an_error_reaches_everybody() -> None:
    for error in on_ranks(3, _fail):
        assert isinstance(error, RankError)
        assert str(error) == "rank 1 stopped with OSError: no space"
