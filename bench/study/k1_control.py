"""The control of the study: k1 as a loss, which this library refuses (objective.py says why)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import kdrl_kernels as kk


@contextmanager
def k1_as_loss() -> Iterator[None]:
    """Within it the distillation term of every loss is l = log p - log q instead of l² / 2.

    The derivative of l in log p is 1: no teacher is in it. On-policy the term takes its weight off
    the token's advantage, for every teacher alike, and that is how it is computed here. The
    teacher's log-probabilities are still there to be logged.
    """
    right = kk.kdrl_loss

    def k1(*args: Any, advantages: Any, kd_weight: Any, **more: Any) -> kk.LossOutput:
        if kd_weight is None:
            return right(*args, advantages=advantages, kd_weight=None, **more)
        nothing = torch.zeros_like(kd_weight)
        return right(*args, advantages=advantages - kd_weight, kd_weight=nothing, **more)

    with mock.patch.object(kk, "kdrl_loss", k1):
        yield
