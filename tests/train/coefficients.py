"""Makes the coefficients of a step for tests, from its rewards and its method."""

from typing import Any

import torch
from torch import Tensor

from kdrl_train.batch import CompletionCoefficients
from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.schedules import scheduled_coefs


def coefficients_of(
    rewards_PG: Tensor, method: MethodConfig, step: int = 0, **fields: Any
) -> CompletionCoefficients:
    """Coefficients by the method's schedules; token weights 1 where there is a reward.

    fields: take the place of those.
    """
    scheduled = scheduled_coefs(method, step)
    values = {
        "advantages": grpo.advantages(rewards_PG, method, scheduled.policy),
        "kd_weight": grpo.kd_weights(rewards_PG, rewards_PG > 0.5, method, scheduled.kd),
        "token_weights": (~rewards_PG.isnan()).float().flatten(),
    }
    return CompletionCoefficients(**values | fields)


def uniform(R: int, **fields: Any) -> CompletionCoefficients:
    """Advantages 0, kd weights 0 and token weights 1 of R completions, but for `fields`."""
    zeros, ones = torch.zeros(R), torch.ones(R)
    values = {"advantages": zeros, "kd_weight": zeros, "token_weights": ones}
    return CompletionCoefficients(**values | fields)
