"""Weights the distillation of a step's groups where several teachers share them.

P prompts, G completions per prompt, R = P * G completions. Every problem has one teacher, and so
has its group.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig


class RoutedWeights(NamedTuple):
    """How strongly each part of a step is distilled."""

    kd_weight: Tensor
    """[R] float32: beta times group factor times mask, of the completion's teacher."""
    kd_coefs: list[float | None]
    """Beta times the mean group factor, before the mask, over the groups of each teacher; None for
    a teacher without a group in the step."""
    kd_coef: float
    """The mean of these over all groups."""


def routed_weights(
    method: MethodConfig,
    betas: Sequence[float],
    rewards_PG: Tensor,
    right_PG: Tensor,
    number_P: Tensor,
    names: Sequence[str] = (),
) -> RoutedWeights:
    """Weight each completion's distillation by the settings of its teacher.

    Args:
        betas: of each teacher by its number, as scheduled_coefs gives them.
        rewards_PG, right_PG: [P, G], as grpo.kd_weights takes them.
        number_P: [P] int64, the number of each group's teacher.
        names: the names of several teachers; empty: the method's own settings hold for all.
    """
    weights_PG, kd_coef = torch.zeros(rewards_PG.shape), 0.0
    kd_coefs: list[float | None] = []
    for number, beta in enumerate(betas):
        settings_of = method.of_teacher(names[number]) if names else method
        groups_P = number_P == number
        rewards, right = rewards_PG[groups_P], right_PG[groups_P]
        if not len(rewards):
            kd_coefs.append(None)
            continue
        weights_PG[groups_P] = grpo.kd_weights(rewards, right, settings_of, beta).view_as(right)
        factor = grpo.group_factor(settings_of.kd_coef, rewards, right)
        kd_coefs.append(beta * factor.mean().item())
        kd_coef += beta * factor.mean().item() * (len(rewards) / len(rewards_PG))
    return RoutedWeights(weights_PG.flatten(), kd_coefs, kd_coef)


def routed_metrics(
    method: MethodConfig, weights: RoutedWeights, policy_coef: float, names: Sequence[str] = ()
) -> dict[str, float | None]:
    """Report kd_coef, kd_coef/NAME of each of several teachers and policy_coef; None without one.

    Args:
        weights: as routed_weights gives them.
        policy_coef: the schedule's value at this step.
        names: as in routed_weights.
    """
    off = method.policy == "off"
    metrics = {
        "kd_coef": None if method.kd is None else weights.kd_coef,
        "policy_coef": None if off else policy_coef,
    }
    return metrics | {f"kd_coef/{name}": weights.kd_coefs[i] for i, name in enumerate(names)}
