"""Checks the teacher's numbers of a top-k divergence."""

from typing import Any

import torch
from torch import Tensor

from kdrl_kernels.call import LossCall
from kdrl_kernels.checks import check_extra_tokens
from kdrl_kernels.chunks import accumulator
from kdrl_kernels.head import Head, check_device
from kdrl_kernels.plain import is_read

MOST_MASS = 1.001
"""The most that probabilities of a row may sum to: rounding of float32 stays far below."""


def check_topk(teacher_topk: Any, head: Head) -> tuple[Tensor, Tensor]:
    """Return ids and log-probabilities [N, K], after every check that reads no value."""
    pair = teacher_topk if isinstance(teacher_topk, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        kinds = ", ".join(type(part).__name__ for part in pair) or type(teacher_topk).__name__
        raise TypeError(f"teacher_topk must be two tensors, (ids, logprobs), got {kinds}")
    if pair[0].is_floating_point() and pair[1].dtype == torch.int64:
        raise TypeError(
            "teacher_topk must be (ids, logprobs), got them the other way round: torch.topk "
            "returns the values first"
        )
    ids = check_extra_tokens(pair[0], False, head, "teacher_topk[0]")
    assert ids is not None
    logprobs = pair[1]
    if not logprobs.is_floating_point():
        raise TypeError(f"teacher_topk[1] must be floating point, got {logprobs.dtype}")
    if logprobs.shape != ids.shape:
        raise ValueError(
            f"teacher_topk[1] must be [N, K] with N = {ids.shape[0]} and K = {ids.shape[1]}, "
            f"as teacher_topk[0], got {list(logprobs.shape)}"
        )
    check_device("teacher_topk[1]", logprobs, "hidden", head.hidden)
    return ids, logprobs.detach().to(accumulator(head.hidden.dtype)).contiguous()


def check_topk_values(call: LossCall) -> None:
    """Raise on a CPU where ids repeat in a row, or its probabilities sum to more than MOST_MASS.

    On a GPU, where that would wait, a repeated id counts as often as it comes, and a sum above 1
    as 1.
    """
    ids, logprobs = call.extra_tokens, call.teacher_topk
    if ids is None or logprobs is None or not is_read(ids):
        return
    active = call.active_rows()
    rows = torch.arange(len(ids))[active]
    ids, logprobs = ids[active], logprobs[active]
    ordered = ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row, k = twice.nonzero()[0].tolist()
        raise ValueError(
            f"teacher_topk[0] must not repeat an id in a row, got {int(ordered[row, k])} twice in "
            f"row {int(rows[row])}: give the second one -1"
        )
    mass = logprobs.masked_fill(ids < 0, -torch.inf).exp().sum(dim=1)
    wrong = ~(mass <= MOST_MASS)  # NaN is wrong too
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            "teacher_topk[1] must be log-probabilities in nats, whose probabilities sum to at most "
            f"1, got a sum of {mass[row].item():.6g} in row {int(rows[row])}: take log_softmax of "
            "all logits, in float32, before the K best"
        )
