"""Computes KDRL's joint loss of a sequence for prime-rl, whose custom loss it is (README.md).

prime-rl gives log-probabilities of the sampled tokens, the sampler's and a reference model's. So
the loss is that of kdrl_kernels.Objective with a sampled KD term, outside the head. Nothing of
prime-rl is imported.
"""

from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import Tensor

from kdrl_kernels.integrations.logprob_losses import SampledKind, near
from kdrl_kernels.objective import (
    Objective,
    Policy,
    clipped_log_ratio,
    policy_log_ratio,
    subtract,
    token_losses,
)
from kdrl_kernels.plain import check_number
from kdrl_kernels.token_rows import Rows

FIELDS = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")


@dataclass(frozen=True, slots=True)
class SequenceLoss:
    """Holds what prime-rl reads of a loss, by the names of its LossOutputs."""

    loss: Tensor
    """0-d, the sum over the tokens of the sequence; prime-rl divides it by the step's."""
    metrics: dict[str, Tensor]
    """0-d means over the tokens of this sequence, which prime-rl averages over sequences."""


def kdrl(
    inputs: Any,
    *,
    kd: SampledKind | None = "k2",
    kd_coef: float = 2e-3,
    kd_clamp: float | None = None,
    kd_ratio_cap: float = 2.0,
    k3_bound: float = 20.0,
    policy: Policy = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> SequenceLoss:
    """Compute the policy gradient and the KD term of one sequence's sampled tokens.

    loss = sum_t weight[t] · (PG[t] + kd_coef · min(r[t], kd_ratio_cap) · KD(l[t])), where
    r = exp(trainer - inference), l = trainer - reference, over the tokens of the loss mask.

    Args:
        inputs: a LossInputs, or what has its fields, [T] each: trainer_logprobs, which alone gets a
            gradient, inference_logprobs (the sampler's), ref_logprobs (older releases:
            teacher_logprobs; not read without a kd), advantages, loss_mask (bool) and loss_weights
            (None or missing: 1). What the mask leaves out may hold NaN.
        kd: a sampled term, whose expected gradient is that of KL(policy‖reference) for "k2" and
            "k3_ratio", of KL(reference‖policy) for "k3". Exact terms need the reference's head.
        kd_coef: beta, constant: prime-rl passes no step to a loss.
        kd_clamp: c in nats, positive: KD reads l within [-c, c], with its gradient. So no token is
            pulled by more than k2's c, which biases the gradient where l is larger; None: no clamp.
        The others: as in kdrl_kernels.Objective.
    Raises: ValueError for an option, or without reference log-probabilities for a kd; TypeError for
        inputs without the fields.
    """
    objective = Objective(
        policy=policy,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kd=kd,
        k3_bound=k3_bound,
        kd_coef=kd_coef,
        kd_ratio_cap=kd_ratio_cap,
    )
    if kd is not None and kd not in get_args(SampledKind):
        raise ValueError(
            f"kd must be one of {get_args(SampledKind)} or None, got {kd!r}: prime-rl has the "
            "reference's log-probability of the sampled token alone"
        )
    if kd_clamp is not None:
        check_number("kd_clamp", kd_clamp)
        if not kd_clamp > 0:
            raise ValueError(f"kd_clamp must be positive or None, got {kd_clamp}")
    rows, weights = _rows(inputs, kd is not None)
    teacher = rows.teacher_logprobs
    if kd_clamp is not None and teacher is not None:
        teacher = near(rows.logprobs, teacher, kd_clamp)
    losses = token_losses(objective, replace(rows, teacher_logprobs=teacher))
    loss = (losses if weights is None else losses * weights).sum()
    return SequenceLoss(loss, _metrics(objective, rows, kd_clamp))


def _rows(inputs: Any, distilled: bool) -> tuple[Rows, Tensor | None]:
    """Read the tokens of the loss mask, and their weights."""
    lacking = [name for name in FIELDS if not hasattr(inputs, name)]
    if lacking:
        raise TypeError(
            f"inputs must be a LossInputs of prime-rl, got {type(inputs).__name__} without "
            f"{', '.join(lacking)}"
        )
    places = inputs.loss_mask.nonzero(as_tuple=True)  # a GPU is waited for once
    reference = getattr(inputs, "ref_logprobs", None)
    if reference is None:
        reference = getattr(inputs, "teacher_logprobs", None)
    if distilled and reference is None:
        raise ValueError(
            "ref_logprobs must be set for a kd, got None: take an algorithm that assigns "
            "advantages and scores the samples with a reference model, or kd=None"
        )
    rows = Rows(
        logprobs=inputs.trainer_logprobs[places],
        old_logprobs=inputs.inference_logprobs[places],
        advantages=inputs.advantages[places],
        teacher_logprobs=reference[places] if distilled and reference is not None else None,
    )
    weights = getattr(inputs, "loss_weights", None)
    return rows, None if weights is None else weights[places]


def _metrics(objective: Objective, rows: Rows, bound: float | None) -> dict[str, Tensor]:
    """Return means over the tokens, 0 where there are none."""
    log_ratio = policy_log_ratio(rows).detach()
    values = {"kdrl/ratio": log_ratio.exp()}
    if objective.policy == "clip":
        assert rows.advantages is not None
        values["kdrl/clipped"] = log_ratio != clipped_log_ratio(
            objective, log_ratio, rows.advantages
        )
    if rows.teacher_logprobs is not None:
        teacher_log_ratio = subtract(rows.logprobs.detach(), rows.teacher_logprobs)
        values["kdrl/teacher_log_ratio"] = teacher_log_ratio  # its mean estimates KL(p‖q)
        if bound is not None:
            values["kdrl/kd_clamped"] = teacher_log_ratio.abs() > bound
    count = max(len(log_ratio), 1)
    return {name: value.float().sum() / count for name, value in values.items()}
