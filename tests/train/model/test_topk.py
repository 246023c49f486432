"""Distillation over the teacher's likeliest tokens, against full logits, here or from a server."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_train.batch import TopkScores
from kdrl_train.config import ModelConfig, TrainConfig
from kdrl_train.method.config import MethodConfig
from kdrl_train.model.policy import Teacher
from tests.train.coefficients import coefficients_of
from tests.train.model.test_policy import KD, pair, relative_error, some_rollouts, step_gradient

K = 5
METHOD = MethodConfig(kd="topk_rkl", kd_topk=K, kd_coef=KD, kd_mask="wrong")


def with_rest(logprobs: Tensor, tail: bool) -> Tensor:
    """Add the probability on none of the tokens as one more token."""
    rest = torch.log1p(-logprobs.exp().sum(dim=1, keepdim=True))
    return torch.cat([logprobs, rest], dim=1) if tail else logprobs


def divergence(kd: str, p: Tensor, q: Tensor) -> Tensor:
    """Sum a divergence over the columns of log-probabilities [T, K]."""
    if kd == "topk_rkl":
        return (p.exp() * (p - q)).sum(dim=1)
    if kd == "topk_fkl":
        return (q.exp() * (q - p)).sum(dim=1)
    m = ((p.exp() + q.exp()) / 2).log()
    return (q.exp() * (q - m) + p.exp() * (p - m)).sum(dim=1) / 2


def all_logprobs(model: Any, r: int) -> Tensor:
    """Return log-probabilities [T, V] of a completion from the model's logits, at 0.8."""
    rollouts, _ = some_rollouts()
    ids = torch.cat([rollouts.prompt_ids[r], rollouts.completion_ids[r]])
    n = len(rollouts.completion_ids[r])
    return (model(input_ids=ids[None]).logits[0, -n - 1 : -1] / 0.8).log_softmax(-1)


def of_server(teacher: Teacher, kd_weight: Tensor) -> list[TopkScores | None]:
    """Say what a server would of the distilled completions."""
    scores: list[TopkScores | None] = []
    for r, tokens in enumerate(some_rollouts()[0].completion_ids):
        q = all_logprobs(teacher.model, r).detach()
        best = q.topk(K, dim=1)
        known = TopkScores(q.gather(1, tokens[:, None]).squeeze(1), best.indices, best.values)
        scores.append(known if kd_weight[r] > 0 else None)
    return scores


@pytest.mark.parametrize(
    ("kd", "tail"),
    [
        ("topk_rkl", True),
        ("topk_fkl", False),
        pytest.param("topk_jsd", True, marks=pytest.mark.slow),
        pytest.param("topk_rkl", False, marks=pytest.mark.slow),
        pytest.param("topk_fkl", True, marks=pytest.mark.slow),
        pytest.param("topk_jsd", False, marks=pytest.mark.slow),
    ],
)
def test_gradient_is_that_of_full_logits(tiny: Callable[..., Any], kd: str, tail: bool) -> None:
    """In float64, with a teacher here and with what a server says of the distilled completions."""
    method = replace(METHOD, kd=kd, kd_tail=tail)
    policy, teacher = pair(tiny, method, torch.float64, "qwen2")
    loss, gradients, metrics = step_gradient(policy, teacher, method, budget=12)

    rollouts, rewards = some_rollouts()
    coefficients = coefficients_of(rewards, method)
    policy.zero_grad()
    expected, measured, log_ratios = torch.zeros((), dtype=torch.float64), [], []
    tokens = sum(len(rollouts.completion_ids[r]) for r in (0, 1, 2, 3, 5))
    for r in (0, 1, 2, 3, 5):  # the fifth completion has no reward
        p, q = all_logprobs(policy.model, r), all_logprobs(teacher.model, r).detach()
        completion = rollouts.completion_ids[r][:, None]
        chosen, ids = p.gather(1, completion).squeeze(1), q.topk(K, dim=1).indices
        of_best = divergence(kd, *(with_rest(x.gather(1, ids), tail) for x in (p, q)))
        weight = coefficients.kd_weight[r]
        ratio = (chosen - chosen.detach()).exp()
        expected = expected + (weight * of_best - ratio * coefficients.advantages[r]).sum() / tokens
        if weight > 0:
            measured.append(of_best)
            log_ratios.append((chosen - q.gather(1, completion).squeeze(1)).detach())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(gradients, [p.grad for p in policy.parameters()]) <= 1e-6
    assert metrics["topk_divergence"] == pytest.approx(torch.cat(measured).mean().item(), rel=1e-6)
    mean = torch.cat(log_ratios).mean().item()
    assert metrics["kl_teacher"] == metrics["teacher_log_ratio"] == pytest.approx(mean, rel=1e-6)

    scores = of_server(teacher, coefficients.kd_weight)
    assert None in scores
    sampled = [None if known is None else known.sampled for known in scores]
    for budget in (1, 1000):
        fields = {"teacher_topk": scores, "teacher_logprobs": sampled}
        remote = step_gradient(policy, None, method, budget, **fields)
        assert relative_error(remote[1], gradients) <= 1e-6
        for name, value in metrics.items():
            assert remote[2][name] == (value and pytest.approx(value, rel=1e-6)), name


def test_all_tokens_are_the_exact_divergence(tiny: Callable[..., Any]) -> None:
    method = replace(METHOD, kd_topk=258, kd_tail=False)
    policy, teacher = pair(tiny, method, torch.float64, "qwen2")
    ours = step_gradient(policy, teacher, method, budget=1000)
    exact = MethodConfig(kd="rkl", kd_coef=KD, kd_mask="wrong")
    policy.objective = type(policy)(policy.model, exact).objective
    theirs = step_gradient(policy, teacher, exact, budget=1000)
    assert relative_error(ours[1], theirs[1]) <= 1e-9
    assert ours[2]["topk_divergence"] == pytest.approx(theirs[2]["kl_teacher"], rel=1e-9)


def test_the_weights_are_those_of_another_teacher(tiny: Callable[..., Any]) -> None:
    """Change only the teacher: the gradient changes."""
    policy, teacher = pair(tiny, METHOD, torch.float64, "qwen2")
    other = Teacher(tiny("llama", seed=5, hidden=48).double(), temperature=0.8)
    gradients = [step_gradient(policy, one, METHOD, budget=12)[1] for one in (teacher, other)]
    assert relative_error(*gradients) > 0.01


def test_what_a_topk_kind_cannot_be_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r'kd must be "topk_rkl", .* with kd_topk or kd_tail, got k2'
    ):
        MethodConfig(kd_topk=8)
    for other in ({"policy": "gspo"}, {"kd_sign_gate": True}, {"loss": "module:function"}):
        with pytest.raises(
            ValueError, match=r'another one than "topk_rkl" with \w+ \S+: what reads'
        ):
            MethodConfig(kd="topk_rkl", **other)
    with pytest.raises(ValueError, match="or kd_tail, got rkl"):
        MethodConfig(kd="rkl", kd_tail=False)
    with pytest.raises(ValueError, match="kd_topk"):
        MethodConfig(kd="topk_rkl", kd_topk=513)
    with pytest.raises(
        ValueError, match=r'tensor_parallel must be 1 with method\.kd "topk_rkl", got 2'
    ):
        TrainConfig(method=METHOD, model=ModelConfig(tensor_parallel=2))
