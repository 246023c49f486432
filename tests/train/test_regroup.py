"""Ranks meet again after an error on one of them, and know which came first."""

import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kdrl_train import regroup
from kdrl_train.errors import RankError
from kdrl_train.ranks import World
from tests.train.ranks import on_ranks

pytestmark = [pytest.mark.fault("stuck or lost rank"), pytest.mark.slow]  # they start processes


def fail_and_meet(failing: int, world: World) -> Any:
    """Fail on a rank, while the others wait for it in a collective of a group that is held."""
    meeting, held = world.meeting, dist.group.WORLD
    try:
        if world.rank == failing:
            time.sleep(0.2)
            raise MemoryError("too much")
        dist.all_reduce(torch.ones(1), group=held)
    except (MemoryError, RuntimeError) as error:
        first, all_here = meeting.hold(error)
        return type(first), str(first), all_here, world.share(lambda: world.rank)
    return "no error"


def test_the_first_error_reaches_all_and_they_meet_again() -> None:
    *others, failed = on_ranks(3, partial(fail_and_meet, 2))
    assert failed == (MemoryError, "too much", True, [0, 1, 2])
    for kind, message, all_here, ranks in others:
        assert (kind, all_here, ranks) == (RankError, True, [0, 1, 2])
        cause, place = message.split(" (test_regroup.py:")
        assert cause == "rank 2 stopped with MemoryError: too much"
        assert place.endswith(': raise MemoryError("too much"))')


def meet_alone(world: World) -> Any:
    """Rank 0 waits for rank 1, which does not come."""
    regroup.MEET_S = 1.0
    if world.rank == 1:
        time.sleep(4)
        return None
    first, all_here = world.meeting.hold(OSError("broken"))
    return type(first), str(first), all_here


def test_a_rank_that_does_not_come_is_named() -> None:
    message = (
        "rank 1 must answer, got nothing for 1 s: it was killed, for its memory say, or is stuck. "
        "Then rank 0 stopped with OSError: broken"
    )
    assert on_ranks(2, meet_alone)[0] == (RankError, message, False)
