"""How much each completion is distilled: masks by TRL's rewards, beta of a step, its history."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kdrl_kernels.integrations.trl import KdrlConfig
from kdrl_kernels.integrations.trl.coefficients import (
    BetaSchedule,
    check_schedule,
    completion_weights,
    token_weights_of_kd,
    total_rewards,
)
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.grpo import kd_weights
from kdrl_train.method.schedules import History, schedule_value

pytestmark = pytest.mark.filterwarnings(
    # TRL's own default of gradient_checkpointing, an old name in transformers 5
    "ignore:.gradient_checkpointing. is deprecated:FutureWarning"
)

ADAPTIVE = ScheduleConfig(kind="reward_adaptive")
BUDGET = ScheduleConfig(kind="kl_budget", initial=0.1, target_kl=0.5, gain=0.5)
PLATEAU = ScheduleConfig(kind="switch", initial=0.5, final=0.0, steps=100, patience=2)
REWARDS = torch.tensor([0.0, 1.0, 0.5, 0.0, 0.75, 1.0])
"""Of three groups of two; 0.5 is not above 0.5."""


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("none", [1, 1, 1, 1, 1, 1]),
        ("wrong", [1, 0, 1, 1, 0, 0]),
        ("wrong_group", [0, 0, 1, 1, 0, 0]),
    ],
)
def test_masks_by_hand(mask: Any, expected: list[int]) -> None:
    weights = completion_weights(REWARDS, 2, MethodConfig(kd_mask=mask), 0.5)
    assert weights.tolist() == expected
    assert weights.dtype == torch.float32


def test_the_threshold_says_what_is_right() -> None:
    method = MethodConfig(kd_mask="wrong")
    assert completion_weights(REWARDS, 2, method, 0.75).tolist() == [1, 0, 1, 1, 1, 0]


def test_an_adaptive_schedule_weights_groups() -> None:
    method = MethodConfig(kd_coef=ADAPTIVE)
    weights = completion_weights(torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1]), 4, method, 0.5)
    assert weights.tolist() == [0.75] * 4 + [0.0] * 4


@pytest.mark.parametrize("mask", ["none", "wrong", "wrong_group"])
@pytest.mark.parametrize("schedule", [ScheduleConfig(), ADAPTIVE], ids=["constant", "adaptive"])
def test_weights_are_those_of_the_trainer(mask: Any, schedule: ScheduleConfig) -> None:
    torch.manual_seed(0)
    rewards = torch.rand(24)
    method = MethodConfig(kd_mask=mask, kd_coef=schedule)
    expected = kd_weights(rewards.view(6, 4), rewards.view(6, 4) > 0.5, method, 0.25)
    assert_close(0.25 * completion_weights(rewards, 4, method, 0.5), expected)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (MethodConfig(), [1, 1, 1, 1, 1, 1]),
        (MethodConfig(kd_mask="wrong"), [0, 1, 0, 0, 1, 0]),
        (MethodConfig(kd_mask="wrong_group"), [0, 1, 0, 0, 0, 0]),
        (MethodConfig(kd_coef=ADAPTIVE), [0, 0, 0, 0, 1, 1]),
    ],
)
def test_a_completion_without_a_reward_is_neither_right_nor_wrong(
    method: MethodConfig, expected: list[int]
) -> None:
    rewards = torch.tensor([math.nan, 0.0, math.nan, math.nan, 0.0, 1.0])
    assert completion_weights(rewards, 2, method, 0.5).tolist() == expected


def test_rewards_are_added_up_as_trl_does() -> None:
    rewards = torch.tensor([[1.0, 2.0], [math.nan, 2.0], [math.nan, math.nan]])
    total = total_rewards(rewards, torch.tensor([1.0, 0.5]))
    assert_close(total, torch.tensor([2.0, 1.0, math.nan]), equal_nan=True)


def test_ends_of_sequence_are_not_distilled() -> None:
    inputs = {"completion_ids": torch.tensor([[5, 0, 7], [6, 2, 1]])}
    ends = torch.tensor([0, 2])
    assert_close(
        token_weights_of_kd(inputs, 0.5, ends), torch.tensor([[0.5, 0, 0.5], [0.5, 0, 0.5]])
    )
    inputs["kd_weight"] = torch.tensor([1.0, 0.5])
    assert_close(token_weights_of_kd(inputs, 0.5, None), torch.tensor([[0.5] * 3, [0.25] * 3]))


def step(schedule: BetaSchedule, kl: float | None, micro_batches: int = 2) -> None:
    """Measure a step's KL in some micro-batches of different sizes, and end it."""
    for i in range(micro_batches if kl is not None else 0):
        tokens = 3.0 + i
        schedule.measured({"kl_sum": kl * tokens, "kd_tokens": tokens})
    schedule.on_step_end(None, None, None)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "step", "switch"])
def test_beta_is_a_function_of_the_step(kind: Any) -> None:
    more = {"at": (2, 5), "values": (0.5, 0.25)} if kind == "step" else {}
    config = ScheduleConfig(kind=kind, initial=1.0, final=0.125, steps=6, **more)
    schedule = BetaSchedule(config)
    assert [schedule.beta(s) for s in range(9)] == [schedule_value(config, s) for s in range(9)]


def test_a_budget_follows_the_kl() -> None:
    schedule = BetaSchedule(BUDGET)
    betas = [schedule.beta(0)]
    for s, kl in enumerate([1.0, 0.25, None, 0.5]):
        step(schedule, kl)
        betas.append(schedule.beta(s + 1))
    assert_close(torch.tensor(betas), torch.tensor([0.1, 0.15, 0.1125, 0.1125, 0.1125]))
    assert schedule.history.kl == [1.0, 0.25, None, 0.5]


def test_a_budget_reads_the_log_ratio_where_the_loss_has_no_kl() -> None:
    schedule = BetaSchedule(BUDGET)
    schedule.measured({"teacher_log_ratio_sum": 3.0, "kd_tokens": 4.0})
    schedule.measured({"tokens": 2.0})
    step(schedule, None)
    assert schedule.history.kl == [0.75]


def test_a_history_is_kept_to_the_bit(tmp_path: Path) -> None:
    schedule = BetaSchedule(BUDGET)
    for kl in [1 / 3, None, 0.1 + 0.2]:
        step(schedule, kl)
    schedule.save(tmp_path)
    resumed = BetaSchedule(BUDGET)
    resumed.load(tmp_path, 3)
    assert resumed.history == schedule.history
    assert resumed.beta(3) == schedule.beta(3) != BUDGET.initial
    with pytest.raises(ValueError, match=r"must hold the KL of 4 steps, got 3"):
        resumed.load(tmp_path, 4)


@pytest.mark.parametrize("text", [None, "{", '{"kl": [1.0]}', "[]"])
def test_a_checkpoint_without_its_history_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "kdrl_state.json").write_text(text)
    with pytest.raises(ValueError, match=r"kdrl_state\.json must hold what .*'kl_budget'") as error:
        BetaSchedule(BUDGET).load(tmp_path, 1)
    assert "\n" not in str(error.value)
    BetaSchedule(ScheduleConfig(kind="linear")).load(tmp_path, 1)  # it needs none


def evaluated(schedule: BetaSchedule, at: int, reward: float, strategy: str = "steps") -> None:
    args = SimpleNamespace(eval_strategy=strategy)
    state = SimpleNamespace(global_step=at, eval_steps=2)
    schedule.on_evaluate(args, state, None, metrics={"eval_reward": reward})


def test_a_plateau_of_the_evaluations_switches() -> None:
    schedule = BetaSchedule(PLATEAU)
    schedule.on_train_begin(None, SimpleNamespace(global_step=0), None)
    for at, reward in [(2, 0.5), (4, 0.5), (6, 0.25)]:
        assert schedule.beta(at) == 0.5
        evaluated(schedule, at, reward)
    assert schedule.beta(6) == 0.0


def test_evaluations_that_an_uninterrupted_run_would_not_make_do_not_count() -> None:
    schedule = BetaSchedule(PLATEAU)
    evaluated(schedule, 2, 0.5)  # before training
    schedule.on_train_begin(None, SimpleNamespace(global_step=0), None)
    evaluated(schedule, 0, 0.5)  # eval_on_start
    evaluated(schedule, 3, 0.5)  # at the end of a run of three steps
    assert schedule.history.scores == []
    evaluated(schedule, 3, 0.5, strategy="epoch")
    assert schedule.history.scores == [0.5]
    schedule.on_train_end(None, None, None)
    evaluated(schedule, 4, 0.5)
    assert schedule.history.scores == [0.5]
    schedule.on_train_begin(None, SimpleNamespace(global_step=0), None)
    assert schedule.history == History()


def config(folder: Path, **options: Any) -> KdrlConfig:
    return KdrlConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **options)


def test_a_plateau_needs_one_evaluation_set(tmp_path: Path) -> None:
    schedule = {"kind": "switch", "final": 0.0, "patience": 2}
    with pytest.raises(ValueError, match=r"eval_strategy and one eval_dataset must be set"):
        check_schedule(config(tmp_path, kd_coef_schedule=schedule), ["problem"])
    args = config(tmp_path, kd_coef_schedule=schedule, eval_strategy="steps", eval_steps=2)
    with pytest.raises(ValueError, match=r"got .*steps.* and NoneType"):
        check_schedule(args, None)
    with pytest.raises(ValueError, match=r"got .*steps.* and dict"):
        check_schedule(args, {"a": ["problem"], "b": ["problem"]})
    check_schedule(args, ["problem"])
    check_schedule(config(tmp_path, kd_coef_schedule={"kind": "switch", "final": 0}), None)


def test_a_budget_needs_a_kl(tmp_path: Path) -> None:
    schedule = {"kind": "kl_budget"}
    with pytest.raises(ValueError, match=r"kd must not be 'topk_rkl' with .*'kl_budget'"):
        check_schedule(config(tmp_path, kd="topk_rkl", kd_coef_schedule=schedule), None)
    check_schedule(config(tmp_path, kd="rkl", kd_coef_schedule=schedule), None)
