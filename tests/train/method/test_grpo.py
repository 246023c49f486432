"""grpo: advantages, masks, schedules, weights and metrics, all by hand."""

import math

import pytest
import torch
from torch import Tensor

from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.histogram import histogram
from kdrl_train.method.metrics import add_sums, reward_metrics, token_means
from kdrl_train.method.presets import PRESETS
from tests.train.coefficients import coefficients_of

NAN = math.nan
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
ROOT3 = math.sqrt(3)


def test_advantages_with_std() -> None:
    # group 0: mean 1/2, squared deviations sum to 1, std = sqrt(1/3); group 2: mean 1/4, sum 3/4,
    # std = 1/2
    values = grpo.group_advantages(REWARDS, "grpo")
    expected = torch.tensor(
        [[ROOT3 / 2, -ROOT3 / 2, -ROOT3 / 2, ROOT3 / 2], [0] * 4, [-0.5, -0.5, 1.5, -0.5]]
    )
    torch.testing.assert_close(values, expected)


def test_advantages_without_std() -> None:
    values = grpo.group_advantages(REWARDS, "dr_grpo")
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0] * 4, [-0.25, -0.25, 0.75, -0.25]])
    torch.testing.assert_close(values, expected)


def test_advantages_leave_one_out() -> None:
    # 1 - (0 + 0 + 1) / 3 = 2/3 and 0 - 2/3; in group 2, 1 - 0 and 0 - 1/3
    values = grpo.group_advantages(REWARDS, "rloo")
    third = 1 / 3
    expected = torch.tensor(
        [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0] * 4, [-third, -third, 1.0, -third]]
    )
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6])
def test_equal_rewards_give_exactly_zero(estimator: str, value: float) -> None:
    # 0.1 summed six times is not 0.6: a mean that is off by one ulp would be a gradient out of
    # nothing
    rewards = torch.full((1, 6), value, dtype=torch.float64)
    values = grpo.group_advantages(rewards, estimator)
    assert torch.equal(values, torch.zeros(1, 6))


def test_std_floor_bounds_the_advantage() -> None:
    rewards = torch.tensor([[0.0, 1e-6]], dtype=torch.float64)
    values = grpo.group_advantages(rewards, "grpo", std_floor=0.1)
    torch.testing.assert_close(values, torch.tensor([[-5e-6, 5e-6]]))


def test_missing_reward_leaves_its_group() -> None:
    rewards = torch.tensor([[1.0, NAN, 0.0, 0.0], [NAN, 1.0, NAN, NAN]])
    # group 0 without it: mean 1/3, squared deviations 4/9 + 1/9 + 1/9 = 2/3, std = sqrt(1/3);
    # group 1 has one reward: nothing to compare
    expected = torch.tensor([[2 / 3 * ROOT3, 0, -ROOT3 / 3, -ROOT3 / 3], [0] * 4])
    torch.testing.assert_close(grpo.group_advantages(rewards, "grpo"), expected)
    leave_one_out = torch.tensor([[1.0, 0, -0.5, -0.5], [0] * 4])
    torch.testing.assert_close(grpo.group_advantages(rewards, "rloo"), leave_one_out)


def test_a_group_without_any_reward_raises() -> None:
    with pytest.raises(ValueError, match="got only NaN in group 1 of this step"):
        grpo.group_advantages(torch.tensor([[1.0, NAN], [NAN, NAN]]), "grpo")


def test_unknown_options_raise() -> None:
    with pytest.raises(ValueError, match=r'estimator must be "grpo".*got "ppo"'):
        grpo.group_advantages(REWARDS, "ppo")
    with pytest.raises(ValueError, match=r'mask must be "none".*got "right"'):
        grpo.kd_mask(REWARDS > 0.5, "right")
    with pytest.raises(ValueError, match=r'mode must be "token_mean".*got "sum"'):
        grpo.token_weights(torch.ones(2), torch.ones(2), "sum", 8)
    with pytest.raises(ValueError, match=r'mode must be "truncate" or "mask", got "none"'):
        grpo.sampler_weights(torch.ones(2), torch.ones(2), "none", 2.0)
    with pytest.raises(ValueError, match=r"rewards_PG must be \[P, G\], got \[3\]"):
        grpo.group_advantages(torch.ones(3), "grpo")


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("none", [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
        ("wrong", [[0, 1, 1], [1, 1, 1], [0, 1, 1]]),
        ("wrong_group", [[0, 0, 0], [1, 1, 1], [0, 0, 0]]),
    ],
)
def test_masks(mask: str, expected: list[list[int]]) -> None:
    right = torch.tensor([[True, False, False], [False] * 3, [True, False, False]])
    assert torch.equal(grpo.kd_mask(right, mask), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("mode", "weights", "normalizer"),
    [
        ("token_mean", [1, 1, 0], 6),
        ("sequence_mean", [1 / 2, 1 / 4, 0], 2),
        ("constant", [1, 1, 0], 16),
    ],
)
def test_token_weights(mode: str, weights: list[float], normalizer: float) -> None:
    lengths, used = torch.tensor([2, 4, 3]), torch.tensor([True, True, False])
    values, total = grpo.token_weights(lengths, used, mode, 8)
    torch.testing.assert_close(values, torch.tensor(weights, dtype=torch.float32))
    assert total.item() == normalizer


def test_coefficients_follow_the_method() -> None:
    rewards = torch.tensor([[1.0, 0.0]])
    half = math.sqrt(0.5)  # deviations of 1/2, std = sqrt(1/2)
    for name, advantages, kd_weight in (
        ("grpo", [half, -half], [0.0, 0.0]),
        ("kdrl_masked", [half, -half], [0.0, 2e-3]),
        ("kd_rkl", [0.0, 0.0], [1.0, 1.0]),
    ):
        coefficients = coefficients_of(rewards, PRESETS[name])
        torch.testing.assert_close(coefficients.advantages, torch.tensor(advantages))
        torch.testing.assert_close(coefficients.kd_weight, torch.tensor(kd_weight))


def test_a_policy_weight_of_zero_leaves_no_advantage() -> None:
    rewards = torch.tensor([[1.0, 0.0]])
    half = math.sqrt(0.5)
    for step, advantages, weights in ((139, [0.0, 0.0], [1.0, 1.0]), (140, [half, -half], [0, 0])):
        coefficients = coefficients_of(rewards, PRESETS["opd_then_rl"], step)
        torch.testing.assert_close(coefficients.advantages, torch.tensor(advantages))
        assert coefficients.kd_weight.tolist() == weights
    assert not coefficients_of(rewards, PRESETS["opd_then_rl"], 139).advantages.any()


def test_the_teacher_counts_most_where_a_group_is_undecided() -> None:
    # shares of right completions: 2/4, 4/4, 1/4; 4p(1 - p): 1, 0, 3/4; of the last one 2/3: 8/9
    rewards = torch.cat([REWARDS, torch.tensor([[1.0, NAN, 0.0, 1.0]])])
    adaptive = ScheduleConfig(kind="reward_adaptive", initial=0.5)
    factor = grpo.group_factor(adaptive, rewards, rewards > 0.5)
    torch.testing.assert_close(factor, torch.tensor([[1], [0], [3 / 4], [8 / 9]]).double())
    method = MethodConfig(kd_coef=adaptive, kd_mask="wrong")
    weights = coefficients_of(rewards, method, step=7).kd_weight
    expected = torch.tensor(
        [[0, 0.5, 0.5, 0], [0] * 4, [3 / 8, 3 / 8, 0, 3 / 8], [0, 4 / 9, 4 / 9, 0]]
    )
    torch.testing.assert_close(weights.view(4, 4), expected)
    assert (
        grpo.group_factor(PRESETS["kdrl"].kd_coef, rewards, rewards > 0.5).tolist() == [[1.0]] * 4
    )


def test_shaped_rewards_by_hand() -> None:
    # beta 1/4 of the sums 4 and -8, and of nothing for the right one: 1, 0 + 1, 0 - 2
    method = MethodConfig(
        kd="reward", kd_coef=ScheduleConfig(initial=0.25), kd_mask="wrong", advantage="dr_grpo"
    )
    rewards = torch.tensor([[1.0, 0.0, 0.0, NAN]], dtype=torch.float64)
    log_ratio = torch.tensor([-3.0, -4.0, 8.0, 0.0], dtype=torch.float64)
    kd_weight = coefficients_of(rewards, method).kd_weight
    assert kd_weight.tolist() == [0.0, 0.25, 0.25, 0.25]
    shaped = grpo.shaped_rewards(rewards, kd_weight, log_ratio)
    advantages = grpo.advantages(shaped, method, 1.0)
    torch.testing.assert_close(advantages, torch.tensor([1.0, 1.0, -2.0, 0.0]))


def test_sampler_weights_by_hand() -> None:
    ratios = torch.tensor([1.0, 1.5, 3.0, 0.6, 0.4, 1e30], dtype=torch.float64)
    sampled = torch.full((6,), -2.0, dtype=torch.float64)
    values, held = grpo.sampler_weights(sampled + ratios.log(), sampled, "truncate", 2.0)
    assert values.tolist() == pytest.approx([1.0, 1.5, 2.0, 0.6, 0.4, 2.0])
    assert held.tolist() == [False, False, True, False, False, True]
    values, held = grpo.sampler_weights(sampled + ratios.log(), sampled, "mask", 2.0)
    assert values.tolist() == pytest.approx([1.0, 1.5, 0.0, 0.6, 0.0, 0.0])
    assert held.tolist() == [False, False, True, False, True, True]
    for mode in ("truncate", "mask"):  # the loss must show it
        assert grpo.sampler_weights(sampled * NAN, sampled, mode, 2.0)[0].isnan().all()


def test_minibatches_are_whole_groups_and_hold_each_once() -> None:
    first, second = grpo.minibatches(4, 2, updates=2)
    assert first.tolist() == [True] * 4 + [False] * 4
    assert second.tolist() == [False] * 4 + [True] * 4
    (whole,) = grpo.minibatches(4, 2, updates=1)
    assert whole.all()
    weights, normalizer = grpo.token_weights(torch.arange(1, 9), first, "token_mean", 9)
    assert weights.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert normalizer.item() == 1 + 2 + 3 + 4


def test_reward_metrics() -> None:
    rewards = torch.tensor([[1.0, 0.0, NAN], [0.5, 0.5, 0.5]])
    right = torch.tensor([[True, False, False], [True, False, True]])
    values = reward_metrics(rewards, right)
    assert values == {
        "reward": 0.5,
        "accuracy": pytest.approx(0.6),  # three of the five with a reward
        "groups_with_signal": 0.5,
        "rewards_missing": 1.0,
    }


def sums(part: slice, kl: Tensor | None = None) -> dict[str, Tensor]:
    """Sums over some of three tokens, the first and third distilled, with l = 1 and -2."""
    log_ratio = torch.tensor([1.0, 0.0, -2.0]).double()[part]
    distilled = torch.tensor([True, False, True])[part]
    mismatch = torch.tensor([0.0, 0.5, 0.0]).double()[part]
    values = {
        "tokens": torch.tensor(len(log_ratio)).double(),
        "clipped": torch.tensor([1.0, 0.5, 0.0])[part].sum(),
        "entropy_sum": torch.tensor([1.0, 2.0, 3.0])[part].sum(),
        "kd_tokens": distilled.sum().double(),
        "teacher_log_ratio_sum": log_ratio[distilled].sum(),
        "k2_sum": (log_ratio[distilled].square() / 2).sum(),
        "kd_flipped": torch.tensor([1.0, 0.0, 0.0])[part].sum(),
        "sampler_mismatch_sum": mismatch.sum(),
        "sampler_mismatch_max": mismatch.max(),
        "teacher_log_ratio_histogram": histogram(log_ratio[distilled]),
    }
    return values if kl is None else values | {"kl_sum": kl[part][distilled].sum()}


def test_token_means_by_hand() -> None:
    means = token_means(sums(slice(None)))
    assert means == {
        "entropy": 2.0,
        "clip_fraction": 0.5,
        "kl_teacher": -0.5,
        "teacher_log_ratio": -0.5,
        **{f"teacher_log_ratio_p{q}": pytest.approx(-2, rel=0.01) for q in (10, 50)},
        **{f"teacher_log_ratio_p{q}": pytest.approx(1, rel=0.01) for q in (90, 99)},
        "k2": 1.25,
        "kd_flip_share": pytest.approx(1 / 3),
        "kd_share": pytest.approx(2 / 3),
        "sampler_mismatch_mean": pytest.approx(0.5 / 3),
        "sampler_mismatch_max": 0.5,
    }
    exact = token_means(sums(slice(None), kl=torch.tensor([0.5, NAN, 0.1])))
    assert exact["kl_teacher"] == pytest.approx(0.3)


def test_token_means_do_not_depend_on_how_the_step_is_cut() -> None:
    together = token_means(sums(slice(None)))
    cut = add_sums(sums(slice(0, 1)), sums(slice(1, 3)))
    assert token_means(cut) == pytest.approx(together)


def test_without_a_teacher_its_metrics_are_absent() -> None:
    names = ("tokens", "sampler_mismatch_sum", "sampler_mismatch_max")
    means = token_means({name: value for name, value in sums(slice(None)).items() if name in names})
    assert means["kl_teacher"] is None
    assert means["entropy"] is None
    assert means["teacher_log_ratio_p50"] is None
    assert means["kd_flip_share"] is None
    assert means["kd_share"] == 0.0


def test_a_baseline_is_for_k2() -> None:
    for kd in ("k3", "rkl", "reward", None):
        with pytest.raises(ValueError, match=rf'^kd must be "k2" with .*, got {kd}'):
            MethodConfig(kd=kd, kd_baseline="kl")


def test_a_share_is_for_the_mixture() -> None:
    assert MethodConfig(kd="rkl+fkl", fkl_share=0.3).fkl_share == 0.3
    for kd in ("k2", "fkl", "reward", None):
        with pytest.raises(
            ValueError, match=rf'^kd must be "rkl\+fkl" with fkl_share 0.3, got {kd}: set kd'
        ):
            MethodConfig(kd=kd, fkl_share=0.3)


def test_distillation_alone_needs_a_teacher_term() -> None:
    for kd in (None, "reward"):
        with pytest.raises(ValueError, match=rf"^kd must be .* got {kd}: nothing would be"):
            MethodConfig(policy="off", kd=kd)
