"""Weights of completions are those that kdrl_train gives them, in whatever order they come."""

import math
import random

import pytest
import torch

from kdrl_kernels.integrations.sequence_weights import (
    needs_groups,
    rewards_by_group,
    schedule_of,
    sequence_weights,
)
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.grpo import kd_weights
from kdrl_train.method.schedules import schedule_value

RAMP = {"kind": "linear", "initial": 0.4, "final": 0.0, "steps": 4}


@pytest.mark.parametrize(("step", "beta"), [(0, 0.4), (1, 0.3), (4, 0.0), (9, 0.0)])
def test_a_schedule_counts_steps_from_0(step: int, beta: float) -> None:
    method = MethodConfig(kd_coef=schedule_of(RAMP))
    assert sequence_weights([0.0, 1.0], method, step).tolist() == pytest.approx([beta, beta])


def test_the_mask_wrong_leaves_right_completions_out() -> None:
    method = MethodConfig(kd_coef=schedule_of(None), kd_mask="wrong")
    assert sequence_weights([0.0, 1.0, 0.5, math.nan], method, 0).tolist() == [1, 0, 1, 1]
    assert sequence_weights([0.0, 1.0, 0.5], method, 0, right_above=0.2).tolist() == [1, 0, 0]
    assert sequence_weights([], method, 0).tolist() == []


@pytest.mark.parametrize("mask", ["none", "wrong", "wrong_group"])
@pytest.mark.parametrize("kind", ["constant", "cosine", "reward_adaptive"])
def test_they_are_the_trainers_in_any_order(mask: str, kind: str) -> None:
    P, G = 6, 4
    rewards_PG = torch.randint(0, 2, (P, G), generator=torch.Generator().manual_seed(3)).double()
    rewards_PG[0], rewards_PG[1] = 0, 1
    schedule = schedule_of({"kind": kind, "initial": 0.3, "final": 0.1, "steps": 10})
    method = MethodConfig(kd_coef=schedule, kd_mask=mask)  # type: ignore[arg-type]
    beta = schedule_value(schedule, 3)
    expected = kd_weights(rewards_PG, rewards_PG > 0.5, method, beta).tolist()
    assert 0 in expected or (mask, kind) in [("none", "constant"), ("none", "cosine")]

    order = random.Random(0).sample(range(P * G), P * G)
    rewards = [rewards_PG.flatten()[r].item() for r in order]
    uids = [f"prompt {r // G}" for r in order]
    here = slice(0, 9)  # of two ranks the first
    groups = None
    if needs_groups(method):
        pairs = list(zip(uids, rewards, strict=True))
        groups = rewards_by_group(uids[here], pairs, G)
    weights = sequence_weights(rewards[here], method, 3, groups=groups)
    assert weights.tolist() == [expected[r] for r in order[here]]


def test_a_part_of_a_group_is_refused() -> None:
    message = "each group must be whole in one update, 3 completions, got groups of \\[2\\]"
    with pytest.raises(ValueError, match=message):
        rewards_by_group(["a"], [("a", 0.0), ("b", 1.0), ("a", 1.0)], 3)


def test_the_kind_alone_is_a_schedule() -> None:
    assert schedule_of("reward_adaptive").kind == "reward_adaptive"
    assert schedule_of({"kind": "step", "at": [3], "values": [0.5]}).at == (3,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "kl_budget"}, 'kd_coef_schedule must depend on .* alone, got "kl_budget"'),
        ({"kind": "switch", "patience": 2}, 'got "switch" that reads metrics of earlier steps'),
        ({"kind": "lineal"}, "kind"),
        ({"kind": "step"}, "at must be one or more increasing steps"),
        ({"kind": "linear", "beta": 1}, "beta"),
    ],
)
def test_a_schedule_that_cannot_be_right_is_refused(settings: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        schedule_of(settings)
