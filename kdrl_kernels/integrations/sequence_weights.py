"""Weights the distillation of whole completions by schedule and reward, as kdrl_train does.

The arithmetic is kdrl_train.method's. What a host knows of a step comes in as rewards, one for each
completion and, where a rule looks at the group, those of its group.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.grpo import group_factor, kd_mask
from kdrl_train.method.schedules import schedule_value

WEIGHT = "kdrl_kd_weight"
"""Key under which a batch carries the weights [bsz] of its completions."""


def schedule_of(settings: Mapping[str, Any] | str | None) -> ScheduleConfig:
    """Read a schedule that depends on the step and on rewards alone.

    Args:
        settings: fields of ScheduleConfig; its kind alone; or None, a constant of 1.
    Raises: ValueError for a schedule that reads what the host does not keep.
    """
    if settings is None:
        return ScheduleConfig(initial=1.0)
    fields = {"kind": settings} if isinstance(settings, str) else dict(settings)
    schedule = ScheduleConfig(**fields)
    if schedule.reads_history:
        raise ValueError(
            f'kd_coef_schedule must depend on the step or on rewards alone, got "{schedule.kind}" '
            "that reads metrics of earlier steps, which this trainer does not keep: use constant, "
            "linear, cosine, step, reward_adaptive, or switch with patience 0"
        )
    return schedule


def needs_groups(method: MethodConfig) -> bool:
    """Say whether the weight of a completion depends on the others of its group."""
    return method.kd_mask == "wrong_group" or method.kd_coef.kind == "reward_adaptive"


def sequence_weights(
    rewards: Sequence[float],
    method: MethodConfig,
    step: int,
    *,
    right_above: float = 0.5,
    groups: Sequence[Sequence[float]] | None = None,
) -> Tensor:
    """Compute beta(step) · group factor · mask of B completions, [B] float32.

    Args:
        rewards: B numbers; NaN where there is no reward.
        method: its kd_coef and kd_mask are read.
        step: from 0.
        right_above: a completion with a larger reward is right.
        groups: for each completion the rewards of its group, its own among them, all of one size;
            None will do unless needs_groups(method).
    """
    assert groups is not None or not needs_groups(method)
    if not len(rewards):
        return torch.zeros(0)
    alone_B1 = torch.tensor(rewards, dtype=torch.float64)[:, None]
    group_BG = alone_B1 if groups is None else torch.tensor(groups, dtype=torch.float64)
    judged_BG = group_BG if method.kd_mask == "wrong_group" else alone_B1
    mask_B = kd_mask(judged_BG > right_above, method.kd_mask)[:, 0]
    factor_B1 = group_factor(method.kd_coef, group_BG, group_BG > right_above)
    return (schedule_value(method.kd_coef, step) * factor_B1[:, 0]).float() * mask_B


def rewards_by_group(
    uids: Sequence[Hashable], everyone: Sequence[tuple[Hashable, float]], group_size: int
) -> list[list[float]]:
    """Collect for each completion of this rank the rewards of its whole group.

    Args:
        uids: name of the group of each completion of this rank.
        everyone: group and reward of each completion of all ranks.
        group_size: completions of a group.
    Raises: ValueError where a part of a group is not in `everyone`.
    """
    rewards: dict[Hashable, list[float]] = defaultdict(list)
    for uid, reward in everyone:
        rewards[uid].append(reward)
    sizes = Counter(len(rewards[uid]) for uid in uids)
    if set(sizes) - {group_size}:
        raise ValueError(
            f"each group must be whole in one update, {group_size} completions, got groups of "
            f"{sorted(sizes)}: make one update of a step's batch, or use kd_mask none or wrong "
            "and another schedule than reward_adaptive"
        )
    return [rewards[uid] for uid in uids]
