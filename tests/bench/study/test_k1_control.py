"""Tests the control of the study: k1 as a loss has no teacher in its gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from bench.study.arms import ARMS
from bench.study.k1_control import K1Policy
from kdrl_train.method.config import MethodConfig
from kdrl_train.model.packing import PackedBatch
from kdrl_train.model.policy import Policy
from kdrl_train.tools.toy.models import ArchitectureConfig, make_model, train_tokenizer

N, H, V = 6, 4, 9


def policy(kind: type[Policy], method: MethodConfig) -> Policy:
    """Make a policy of either class; tests call its loss on tensors of their own."""
    tokenizer = train_tokenizer(["1 + 2 = 3"], vocab_size=300)
    model = make_model(ArchitectureConfig(hidden=32, layers=1), tokenizer, seed=0)
    return kind(model, method)


@pytest.fixture(scope="module")
def control() -> Policy:
    method = ARMS["k1_as_loss"].method
    assert method is not None
    return policy(K1Policy, method)


@pytest.fixture(scope="module")
def plain() -> Policy:
    method = ARMS["kdrl"].method
    assert method is not None
    return policy(Policy, method)


def pack(tokens: Tensor, **fields: Any) -> PackedBatch:
    """Make a pack of one sequence whose tokens have weight 1, advantage 0 and kd_weight 0."""
    count, zeros = len(tokens), torch.zeros(len(tokens), dtype=torch.float64)
    values = {
        "input_ids": tokens[None],
        "position_ids": torch.arange(count)[None],
        "loss_index": torch.arange(count),
        "tokens": tokens,
        "rollout": torch.zeros_like(tokens),
        "sampled_logprobs": zeros,
        "advantages": zeros,
        "token_weights": zeros + 1,
        "kd_weight": zeros,
        "lengths": (count,),
        "needs_teacher": True,
    }
    return PackedBatch(**values | fields)


def loss(
    model: Policy, hidden: Tensor, weight: Tensor, batch: PackedBatch, teacher: Tensor
) -> tuple[kk.LossOutput, Tensor]:
    """Return the output of the policy's loss, a mean over the tokens, and its gradient."""
    leaf = weight.clone().requires_grad_()
    normalizer = torch.tensor(float(len(batch.tokens)), dtype=torch.float64)
    head = kk.TeacherHead(hidden, teacher)
    out = model.loss(hidden, leaf, None, batch, normalizer, head, model.objective)
    out.loss.backward()
    assert leaf.grad is not None
    return out, leaf.grad


def random_case() -> tuple[Tensor, Tensor, PackedBatch, list[Tensor]]:
    """Return hidden states, a head, a pack, and the heads of two teachers."""
    rng = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    hidden, weight = randn(N, H), randn(V, H)
    batch = pack(
        torch.randint(V, (N,), generator=rng),
        advantages=randn(N),
        kd_weight=torch.tensor([0.3, 0.3, 0.0, 0.3, 0.1, 0.3], dtype=torch.float64),
        token_weights=torch.tensor([1.0, 1, 1, 0, 1, 1], dtype=torch.float64),
    )
    return hidden, weight, batch, [randn(V, H), randn(V, H)]


def test_the_gradient_is_that_of_l_and_the_same_for_every_teacher(
    control: Policy, plain: Policy
) -> None:
    hidden, weight, batch, teachers = random_case()
    leaf = weight.clone().requires_grad_()
    lp = (hidden @ leaf.T).log_softmax(-1).gather(1, batch.tokens[:, None])[:, 0]
    lq = (hidden @ teachers[0].T).log_softmax(-1).gather(1, batch.tokens[:, None])[:, 0]
    losses = -batch.advantages * (lp - lp.detach()).exp() + batch.kd_weight * (lp - lq)
    value = (batch.token_weights * losses).sum() / N
    expected = torch.autograd.grad(value, leaf)[0]
    (out, first), (_, second) = (loss(control, hidden, weight, batch, one) for one in teachers)
    torch.testing.assert_close(out.loss, value)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    (_, with_k2), (_, with_other) = (loss(plain, hidden, weight, batch, one) for one in teachers)
    assert (with_k2 - with_other).abs().max() > 1e-3


def test_what_is_logged_is_what_k2_would_log(control: Policy, plain: Policy) -> None:
    hidden, weight, batch, (teacher, _) = random_case()
    (ours, _), (theirs, _) = (
        loss(model, hidden, weight, batch, teacher) for model in (control, plain)
    )
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, value in theirs.metrics.items():
        torch.testing.assert_close(ours.metrics[name], value, msg=name)
    for name in ("logprobs", "teacher_logprobs", "entropy"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), msg=name)


def test_the_expected_gradient_of_the_term_is_zero(control: Policy, plain: Policy) -> None:
    """One prefix is enumerated exactly: every token of the vocabulary at its probability."""
    rng = torch.Generator().manual_seed(1)
    hidden, weight, teacher = (
        torch.randn(*size, generator=rng, dtype=torch.float64) for size in ((1, H), (V, H), (V, H))
    )
    p = (hidden @ weight.T).softmax(-1)[0]
    batch = pack(torch.arange(V), token_weights=p, kd_weight=torch.ones_like(p))
    (_, gradient), (_, with_k2) = (
        loss(model, hidden.expand(V, H), weight, batch, teacher) for model in (control, plain)
    )
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)
    assert with_k2.abs().max() > 1e-2


def test_a_pack_without_distilled_tokens_has_the_loss_of_any_policy(
    control: Policy, plain: Policy
) -> None:
    hidden, weight, batch, _ = random_case()
    normalizer = torch.tensor(float(N), dtype=torch.float64)
    ours, theirs = (
        model.loss(hidden, weight, None, batch, normalizer, None, model.objective_alone).loss
        for model in (control, plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
