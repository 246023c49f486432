"""Losses of log-probabilities are those of kdrl_loss, and have the gradients of their names."""

import math

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels.integrations.logprob_losses import SampledKd, policy_losses

KINDS = ["k2", "k3", "k3_ratio"]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kd", KINDS)
def test_the_sum_of_both_is_kdrl_loss(kd: str) -> None:
    torch.manual_seed(0)
    N, H, V = 40, 5, 11
    hidden, weight, tokens = leaf(N, H), leaf(V, H), torch.randint(0, V, (N,))
    teacher = torch.randn(N, dtype=torch.float64) - 2
    logprobs = kk.linear_logprobs(hidden, weight, tokens).logprobs
    old = logprobs.detach() + torch.randn(N, dtype=torch.float64)
    advantages, kd_weight = torch.randn(N, dtype=torch.float64), torch.rand(N).round(decimals=1)
    ours = policy_losses(logprobs, old, advantages, clip_low=0.1, clip_high=0.3, dual_clip=2.0)
    term = SampledKd(kd, ratio_cap=1.5, k3_bound=1.0)  # type: ignore[arg-type]
    ours = ours + 0.7 * term.losses(logprobs, teacher, old, kd_weight)
    gradients = torch.autograd.grad(ours.mean(), (hidden, weight))

    objective = kk.Objective(
        clip_low=0.1,
        clip_high=0.3,
        dual_clip=2.0,
        kd=kd,  # type: ignore[arg-type]
        kd_coef=0.7,
        kd_ratio_cap=1.5,
        k3_bound=1.0,
    )
    out = kk.kdrl_loss(
        hidden,
        weight,
        tokens,
        advantages=advantages,
        old_logprobs=old,
        teacher_logprobs=teacher,
        kd_weight=kd_weight,
        objective=objective,
    )
    torch.testing.assert_close(ours.mean(), out.loss, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(out.loss, (hidden, weight))
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kd", KINDS)
def test_the_expected_gradient_over_all_tokens_is_that_of_a_kl(kd: str) -> None:
    torch.manual_seed(1)
    logits, q = leaf(7), torch.randn(7, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    p = logprobs.detach().exp()
    losses = SampledKd(kd).losses(logprobs, q)  # type: ignore[arg-type]
    (ours,) = torch.autograd.grad((p * losses).sum(), logits, retain_graph=True)
    forward, reverse = (q.exp() * (q - logprobs)).sum(), (logprobs.exp() * (logprobs - q)).sum()
    (expected,) = torch.autograd.grad(forward if kd == "k3" else reverse, logits)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("log_ratio", "loss", "pull"),
    [(0.5, 0.125, 0.5), (3.0, 0.5, 1.0), (-3.0, 0.5, -1.0), (math.inf, 0.5, 1.0)],
)
def test_a_clamp_bounds_the_pull_and_keeps_it(log_ratio: float, loss: float, pull: float) -> None:
    student = torch.tensor([-1.0], requires_grad=True)
    value = SampledKd("k2", clamp=1.0).losses(student, student.detach() - log_ratio)
    assert value.item() == loss
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.item() == pull


def test_a_clamp_bounds_k3_on_both_sides() -> None:
    student = torch.tensor([-1.0, -1.0], requires_grad=True)
    losses = SampledKd("k3", clamp=2.0).losses(student, torch.tensor([4.0, -9.0]))
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    torch.testing.assert_close(gradient, torch.tensor([1 - math.exp(2), 1 - math.exp(-2)]))


def test_a_token_of_weight_0_may_have_any_teacher() -> None:
    student = torch.tensor([-1.0, -1.0], requires_grad=True)
    teacher, weight = torch.tensor([-math.inf, -2.0]), torch.tensor([0.0, 3.0])
    losses = SampledKd().losses(student, teacher, None, weight)
    assert losses.tolist() == [0.0, 1.5]
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert gradient.tolist() == [0.0, 3.0]


def test_a_stale_token_has_a_bounded_weight() -> None:
    student = torch.tensor([-1.0, -1.0])
    old = torch.tensor([-1.0 - math.log(1.5), -9.0])
    term = SampledKd(ratio_cap=2.0)
    torch.testing.assert_close(term.ratio_weight(student, old), torch.tensor([1.5, 2.0]))
    losses = term.losses(student, torch.tensor([-3.0, -3.0]), old)
    torch.testing.assert_close(losses, torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd": "k1"}, r"kd must be one of \('k2', 'k3', 'k3_ratio'\), got 'k1'"),
        ({"clamp": 0}, "kd_clamp must be positive or None, got 0"),
        ({"ratio_cap": 0.0}, "kd_ratio_cap must be positive"),
        ({"k3_bound": 99}, "k3_bound must be"),
    ],
)
def test_a_term_that_cannot_be_right_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampledKd(**options)
