"""overlong: DAPO's fine for length, by hand, and that it changes no verdict."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kdrl_train.batch import Rollouts, Verdicts
from kdrl_train.config import RewardConfig, SamplingConfig, TrainConfig
from kdrl_train.method.overlong import overlong_fines
from kdrl_train.step.collect import fined


def test_the_fine_grows_linearly_over_the_buffer() -> None:
    """DAPO, equation 13, with L_max = 20 and L_cache = 4: 0 up to 16 tokens, -1 at 20."""
    lengths = [1, 16, 17, 18, 20]
    assert overlong_fines(lengths, 20, 4, 1.0) == [0.0, 0.0, -0.25, -0.5, -1.0]
    assert overlong_fines(lengths, 20, 20, 0.5) == [-0.025, -0.4, -0.425, -0.45, -0.5]
    assert overlong_fines([21, 10**6], 20, 4, 2.0) == [-2.0, -2.0]  # never more than the penalty


def test_rewards_are_fined_and_verdicts_are_not(config: Callable[..., TrainConfig]) -> None:
    rollouts = Rollouts(
        prompt_ids=[torch.zeros(1)] * 3,
        completion_ids=[torch.zeros(length) for length in (4, 7, 8)],
        logprobs=[],
        truncated=torch.tensor([False, False, True]),
        texts=[""] * 3,
    )
    outcomes = ["right", "right", "error"]
    verdicts = Verdicts([1.0, 1.0, math.nan], outcomes, parts={"math": [1.0, 1.0, math.nan]})
    off = config(sampling=SamplingConfig(max_new_tokens=8))
    assert fined(verdicts, rollouts, off) is verdicts
    on = replace(off, reward=RewardConfig(overlong_buffer=4, overlong_penalty=0.8))
    after = fined(verdicts, rollouts, on)
    assert after.rewards[:2] == [1.0, pytest.approx(0.4)]
    assert math.isnan(after.rewards[2])
    assert after.outcomes == outcomes
    assert after.parts["overlong"] == [0.0, pytest.approx(-0.6), -0.8]
    assert after.parts["math"] == verdicts.parts["math"]


def test_a_buffer_longer_than_the_longest_completion_is_refused(
    config: Callable[..., TrainConfig],
) -> None:
    message = r"^reward\.overlong_buffer must be at most sampling\.max_new_tokens, got 9 and 8$"
    with pytest.raises(ValueError, match=message):
        replace(config(), reward=RewardConfig(overlong_buffer=9))
