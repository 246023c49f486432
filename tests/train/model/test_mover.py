"""Moves models in and out of the memory of a device, one at a time."""

from collections.abc import Callable
from typing import Any

import torch

from kdrl_train.model.mover import Mover
from kdrl_train.model.packing import PackedBatch
from kdrl_train.model.policy import Teacher


class Recorded(Mover):
    """Notes what it keeps on its device, as a CPU stands for it."""

    def present(self) -> list[Any]:
        return [model for model in self._kept if model is self._present]


def test_one_teacher_at_a_time_is_on_the_device(tiny: Callable[..., Any]) -> None:
    mover = Recorded(torch.device("cpu"))
    first, second = (Teacher(tiny("llama", seed=seed)) for seed in (3, 4))
    batch = PackedBatch(
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
    expected = [teacher(batch) for teacher in (first, second)]
    for teacher in (first, second):
        mover.keep(teacher)
    assert mover.present() == []
    for turn, moves in ((0, 1), (0, 1), (1, 2), (1, 2), (0, 3)):
        teacher = (first, second)[turn]
        head = teacher(batch)
        assert (mover.present(), mover.moves) == ([teacher], moves)
        for name in ("hidden", "weight"):
            assert torch.equal(getattr(head, name), getattr(expected[turn], name))
    kept = first.model.get_output_embeddings().weight
    head = first(batch)
    second(batch)
    assert head.weight is not kept  # it keeps its values when the teacher has left
