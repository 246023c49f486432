"""Expected gradients of shaped rewards and of importance weights, over all sequences."""

from collections.abc import Callable

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train.method import grpo

V = 3
"""Of the tiny vocabulary whose sequences of two tokens are enumerated: four prefixes, V tokens."""


def table(seed: int) -> Tensor:
    """Logits [prefix, V]: of the first token, and of the second after each first one."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(V + 1, V, generator=draw, dtype=torch.float64)


def sequence_logprobs(logits: Tensor) -> Tensor:
    """[V, V, 2]: log-probability of each token of each sequence (y1, y2)."""
    logp = logits.log_softmax(1)
    first = logp[0][:, None].expand(V, V)
    return torch.stack([first, logp[1:]], dim=2)


def expected_gradient(student: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """Gradient [prefix, V] of the sum over sequences and tokens of weight · policy-gradient loss.

    advantages, weights: [V, V, 2].
    """
    first, second = torch.meshgrid(torch.arange(V), torch.arange(V), indexing="ij")
    prefix = torch.stack([torch.zeros_like(first), 1 + first], dim=2).flatten()
    tokens = torch.stack([first, second], dim=2).flatten()
    logits = student.clone().requires_grad_()
    kk.kdrl_loss(
        logits[prefix],
        torch.eye(V, dtype=torch.float64),
        tokens,
        advantages=advantages.flatten(),
        token_weights=weights.flatten(),
        normalizer=1.0,
        objective=kk.Objective(kd=None),
    ).loss.backward()
    assert logits.grad is not None
    return logits.grad


def gradient_of(value: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    logits = student.clone().requires_grad_()
    return torch.autograd.grad(value(logits), logits)[0]


def test_a_shaped_reward_follows_the_kl_of_whole_sequences() -> None:
    """In expectation its gradient is that of KL(p‖q) over sequences: the first token is held
    responsible for the log-ratio of the second, which the KD term of the loss does not do."""
    student, teacher = table(0), table(1)
    logp, logq = sequence_logprobs(student), sequence_logprobs(teacher)
    chance = logp.sum(2).exp()[:, :, None].expand(V, V, 2)
    shaping = (logq - logp).sum(2, keepdim=True).expand(V, V, 2)
    result = expected_gradient(student, shaping, chance)

    def sequence_kl(logits: Tensor) -> Tensor:
        p = sequence_logprobs(logits).sum(2)
        return (p.exp() * (p - logq.sum(2))).sum()

    def token_kl(logits: Tensor) -> Tensor:
        """Mean over prefixes as they are sampled, no gradient through which prefixes these are."""
        p, q = logits.log_softmax(1), teacher.log_softmax(1)
        kl = (p.exp() * (p - q)).sum(1)
        return kl[0] + (p[0].exp().detach() * kl[1:]).sum()

    torch.testing.assert_close(result, gradient_of(sequence_kl, student), rtol=1e-10, atol=1e-12)
    other = gradient_of(token_kl, student)
    assert (result[0] - other[0]).abs().max() > 0.01
    torch.testing.assert_close(result[1:], other[1:], rtol=1e-10, atol=1e-12)


def test_importance_weights_undo_another_sampler_in_expectation() -> None:
    """Tokens drawn from the sampler, prefix given: with w = p / s the policy gradient is that of
    the trainer's own samples; a cap or a mask leaves exactly the tokens beyond it."""
    student, sampler = table(0), table(2)
    p, s = student.log_softmax(1), sampler.log_softmax(1)
    rewards = torch.linspace(-1, 2, V, dtype=torch.float64).expand(V + 1, V)

    def one_token(weights: Tensor) -> Tensor:
        logits = student.clone().requires_grad_()
        kk.kdrl_loss(
            logits.repeat_interleave(V, dim=0),
            torch.eye(V, dtype=torch.float64),
            torch.arange(V).repeat(V + 1),
            advantages=rewards.flatten(),
            token_weights=(s.exp() * weights).flatten(),
            normalizer=1.0,
            objective=kk.Objective(kd=None),
        ).loss.backward()
        return logits.grad

    exact = gradient_of(lambda logits: -(logits.softmax(1) * rewards).sum(), student)
    free, held = grpo.sampler_weights(p, s, "truncate", 1e9)
    assert not held.any()
    torch.testing.assert_close(one_token(free), exact, rtol=1e-10, atol=1e-12)
    assert (one_token(torch.ones_like(free)) - exact).abs().max() > 0.01
    for mode in ("truncate", "mask"):
        weights, held = grpo.sampler_weights(p, s, mode, 1.5)
        assert held.any()
        lost = one_token((free - weights) * held)
        torch.testing.assert_close(one_token(weights) + lost, exact, rtol=1e-10, atol=1e-12)
        assert lost.abs().max() > 0.01
