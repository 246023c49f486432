"""Moves models in and out of the memory of a device, one at a time."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdrl_train.model.mover import Mover
from kdrl_train.model.packing import PackedBatch
from kdrl_train.model.policy import Teacher

BATCH = PackedBatch(
    input_ids=torch.arange(5)[None],
    position_ids=torch.arange(5)[None],
    loss_index=torch.tensor([2, 3, 4]),
    tokens=torch.tensor([3, 4, 5]),
    rollout=torch.zeros(3, dtype=torch.int64),
    sampled_logprobs=torch.zeros(3),
    advantages=torch.zeros(3),
    token_weights=torch.ones(3),
    kd_weight=torch.ones(3),
    lengths=(5,),
    needs_teacher=True,
)


class CopyingMover(Mover):
    """Has copies in CPU memory stand for those of a device, and counts those that live."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.copies: list[weakref.ref[Tensor]] = []

    def _lent(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self.copies.append(weakref.ref(copy.untyped_storage()))
        return copy


def weights(teacher: Teacher) -> list[int]:
    return [tensor.data_ptr() for tensor in [*teacher.parameters(), *teacher.buffers()]]


def test_one_teacher_at_a_time_is_on_the_device(tiny: Callable[..., Any]) -> None:
    mover = CopyingMover()
    teachers = [Teacher(tiny("llama", seed=seed)) for seed in (3, 4)]
    expected = [teacher(BATCH) for teacher in teachers]
    for teacher in teachers:
        mover.keep(teacher)
    kept = [weights(teacher) for teacher in teachers]
    for turn, moves in ((0, 1), (0, 1), (1, 2), (1, 2), (0, 3)):
        head = teachers[turn](BATCH)
        assert mover.moves == moves
        for name in ("hidden", "weight"):
            assert torch.equal(getattr(head, name), getattr(expected[turn], name))
        assert not set(weights(teachers[turn])) & set(kept[turn])
        assert weights(teachers[1 - turn]) == kept[1 - turn]  # it has left, without a copy


def test_a_head_keeps_its_values_when_its_teacher_has_left(tiny: Callable[..., Any]) -> None:
    mover = CopyingMover()
    teachers = [Teacher(tiny("llama", seed=seed, tie_word_embeddings=False)) for seed in (3, 4)]
    for teacher in teachers:
        mover.keep(teacher)
    head = teachers[0](BATCH)
    teachers[1](BATCH)
    assert head.weight.data_ptr() != teachers[0].model.get_output_embeddings().weight.data_ptr()
    del head
    gc.collect()
    alive = sum(copy() is not None for copy in mover.copies)
    assert alive == len(weights(teachers[1]))  # those of the first one are free
