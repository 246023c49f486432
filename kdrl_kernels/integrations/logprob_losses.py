"""Computes the joint loss where a host has log-probabilities, not hidden states.

The loss of a token is that of kdrl_kernels.objective, here as a function of log-probabilities of
any shape. The host's own backward pass then takes it through the head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kdrl_kernels.objective import Objective, subtract, token_losses
from kdrl_kernels.plain import check_number
from kdrl_kernels.token_rows import Rows

SampledKind = Literal["k2", "k3", "k3_ratio"]


def policy_losses(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """Compute the clipped policy gradient of each token, differentiable in logprobs.

    Args:
        logprobs, old_logprobs, advantages: of one shape; the first two in nats.
        clip_low, clip_high, dual_clip: as in kdrl_kernels.Objective.
    """
    objective = Objective(kd=None, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return token_losses(objective, Rows(logprobs, old_logprobs, advantages))


def read_numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Read 0-d tensors of one device; the host waits for a GPU once for all of them."""
    together = torch.stack([value.detach().double() for value in values.values()])
    return dict(zip(values, together.tolist(), strict=True))


def near(logprobs: Tensor, teacher_logprobs: Tensor, bound: float) -> Tensor:
    """Move the teacher to within a bound of the student, in nats, as a constant.

    A KD term that reads this has log p - log q within the bound, and keeps its pull beyond it.
    """
    student = logprobs.detach()
    return student - subtract(student, teacher_logprobs).clamp(-bound, bound)


@dataclass(frozen=True, slots=True)
class SampledKd:
    """Says how a token is distilled whose log-probability under the teacher is known.

    Args:
        kd: "k2", "k3" or "k3_ratio", as in kdrl_kernels.Objective: the expected gradient is that of
            the reverse KL for "k2" and "k3_ratio", of the forward KL for "k3".
        ratio_cap: bound of the weight s = min(p / p_old, ratio_cap) of each token, positive.
        clamp: bound of |log p - log q| in nats, positive, or None. Beyond it a token keeps the pull
            that it has at the bound; a bound of the loss would take its gradient away instead.
        k3_bound: as in kdrl_kernels.Objective.
    Raises: ValueError for an unknown kind or a number out of range, TypeError for what is none.
    """

    kd: SampledKind = "k2"
    ratio_cap: float = 2.0
    clamp: float | None = None
    k3_bound: float = 20.0

    def __post_init__(self) -> None:
        if self.kd not in get_args(SampledKind):
            raise ValueError(f"kd must be one of {get_args(SampledKind)}, got {self.kd!r}")
        if self.clamp is not None:
            check_number("kd_clamp", self.clamp)
            if not self.clamp > 0:
                raise ValueError(f"kd_clamp must be positive or None, got {self.clamp}")
        assert self.objective  # which checks the other numbers

    @property
    def objective(self) -> Objective:
        """The term alone, with a coefficient of 1."""
        return Objective(
            policy="off",
            kd=self.kd,
            kd_coef=1.0,
            kd_ratio_cap=self.ratio_cap,
            k3_bound=self.k3_bound,
        )

    def ratio_weight(self, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
        """Compute s of each token, a constant."""
        log_ratio = logprobs.detach() - old_logprobs
        return log_ratio.clamp(max=math.log(self.ratio_cap)).exp()

    def losses(
        self,
        logprobs: Tensor,
        teacher_logprobs: Tensor,
        old_logprobs: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Compute weight · s · KD of each token, differentiable in logprobs.

        Args:
            logprobs, teacher_logprobs, old_logprobs: of one shape, in nats; without old_logprobs
                s is 1.
            weight: of this shape, schedule and mask; None: 1. Where it is 0, so is the loss,
                whatever the teacher's number is.
        """
        if self.clamp is not None:
            teacher_logprobs = near(logprobs, teacher_logprobs, self.clamp)
        rows = Rows(logprobs, old_logprobs, None, weight, teacher_logprobs)
        return token_losses(self.objective, rows)
