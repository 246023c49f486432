"""self_teacher: what the policy says after another prompt, aligned by completion token."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train.batch import Rollouts
from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.model import packing
from kdrl_train.model.load import checkpoint_activations
from kdrl_train.model.packing import pack
from kdrl_train.model.policy import Policy, Teacher, objective
from kdrl_train.model.self_teacher import EmaTeacher, LiveTeacher
from kdrl_train.model.teachers import Teachers
from tests.pretended_gpu import move, pretend
from tests.train.coefficients import coefficients_of
from tests.train.model.test_policy import KD, V, relative_error, some_rollouts

T = 0.8
"""The sampling temperature."""
RKL = MethodConfig(kd="rkl", kd_coef=KD)
K2 = MethodConfig(kd="k2", kd_coef=KD, policy="off")


def hints(rollouts: Rollouts) -> list[Tensor]:
    """The teacher's prompts: another number of other tokens before the policy's."""
    draw = torch.Generator().manual_seed(5)
    more = [torch.randint(2, V, (3 + r % 2,), generator=draw) for r in range(6)]
    return [torch.cat(both) for both in zip(more, rollouts.prompt_ids, strict=True)]


def chosen_logits(model: Any, prompt: Tensor, completion: Tensor) -> Tensor:
    """Log-probabilities [T, V] of the whole model where it predicts a completion."""
    ids = torch.cat([prompt, completion])[None]
    return (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / T).log_softmax(dim=1)


def full_logits_gradient(policy: Policy, teacher: Any, method: MethodConfig) -> list[Tensor]:
    """The gradient of a step by autograd through the logits of the whole model."""
    rollouts, rewards = some_rollouts()
    read = hints(rollouts)
    weights, normalizer = grpo.token_weights(
        rollouts.lengths, ~rewards.isnan().flatten(), method.token_weights, 9
    )
    coefficients = coefficients_of(rewards, method)
    total = torch.zeros((), dtype=torch.float64)
    for r in (0, 1, 2, 3, 5):  # the fifth has no reward
        completion = rollouts.completion_ids[r]
        p = chosen_logits(policy.model, rollouts.prompt_ids[r], completion)
        q = chosen_logits(teacher, read[r], completion).detach()
        at = completion[:, None]
        logp, logq = p.gather(1, at)[:, 0], q.gather(1, at)[:, 0]
        kd = (p.exp() * (p - q)).sum(dim=1) if method.kd == "rkl" else 0.5 * (logp - logq).square()
        losses = coefficients.kd_weight[r] * kd
        if method.policy != "off":
            losses = losses - (logp - logp.detach()).exp() * coefficients.advantages[r]
        total = total + weights[r] * losses.sum() / normalizer
    policy.zero_grad()
    total.backward()
    return [p.grad.clone() for p in policy.parameters()]


def gradient(policy: Policy, teacher: Any, method: MethodConfig, budget: int) -> list[Tensor]:
    rollouts, rewards = some_rollouts()
    weights, normalizer = grpo.token_weights(
        rollouts.lengths, ~rewards.isnan().flatten(), method.token_weights, 9
    )
    read = hints(rollouts)
    coefficients = coefficients_of(rewards, method, token_weights=weights, teacher_prompts=read)
    teachers = Teachers(("default",), {0: teacher})
    policy.zero_grad()
    for batch in pack(rollouts, coefficients, budget):
        policy(batch, normalizer, teachers.head(batch)).loss.backward()
    return [p.grad.clone() for p in policy.parameters()]


def policy_of(tiny: Callable[..., Any], method: MethodConfig) -> Policy:
    model = tiny("qwen2", seed=1, tie_word_embeddings=True).double()
    return Policy(model, method, temperature=T, compute_dtype=torch.float64)


def frozen_copy(policy: Policy) -> Teacher:
    return Teacher(deepcopy(policy.model), temperature=T, compute_dtype=torch.float64)


def test_the_preset_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2), advantage 1, token 0: KL(p‖q) = 3/4 ln 3/2 + 1/4 ln 1/2."""
    method = PRESETS["self_distillation"]
    assert (method.policy, method.kd_coef.kind) == ("clip", "constant")
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64, requires_grad=True)
    eye, one = torch.eye(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    out = kk.kdrl_loss(
        logits,
        eye,
        torch.zeros(1, dtype=torch.int64),
        advantages=one,
        teacher=kk.TeacherHead(torch.zeros(1, 2, dtype=torch.float64), eye),
        kd_weight=one * method.kd_coef.initial,
        objective=objective(method, distil=True),
        impl="reference",
    )
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert out.loss.item() == pytest.approx(-1 + 0.1 * kl)
    out.loss.backward()
    pull = -0.25 + 0.1 * 0.75 * (math.log(1.5) - kl)
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([pull, -pull])


@pytest.mark.parametrize(
    "method", [RKL, pytest.param(K2, marks=pytest.mark.slow)], ids=["rkl", "k2 alone"]
)
def test_the_gradient_is_that_of_full_logits_after_two_prompts(
    tiny: Callable[..., Any], method: MethodConfig
) -> None:
    policy = policy_of(tiny, method)
    teacher = tiny("llama", seed=2, hidden=48).double()
    for model, ours in (
        (policy.model, LiveTeacher(policy)),  # no gradient flows through what it says
        (teacher, Teacher(teacher, temperature=T, compute_dtype=torch.float64)),
    ):
        expected = full_logits_gradient(policy, model, method)
        assert max(g.abs().max() for g in expected) > 1e-3
        for budget in (1, 16, 1000):
            assert relative_error(gradient(policy, ours, method, budget), expected) <= 1e-6


def test_a_row_too_early_is_seen(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees an alignment that is off by one token."""
    policy, make = policy_of(tiny, RKL), packing._teacher_inputs
    expected = full_logits_gradient(policy, policy.model, RKL)

    def early(*arguments: Any) -> Any:
        inputs = make(*arguments)
        return inputs and inputs._replace(loss_index=inputs.loss_index - 1)

    monkeypatch.setattr(packing, "_teacher_inputs", early)
    assert relative_error(gradient(policy, LiveTeacher(policy), RKL, 1000), expected) > 1e-2


def test_live_weights_teach_as_a_frozen_copy_does_at_step_0(tiny: Callable[..., Any]) -> None:
    policy = policy_of(tiny, RKL)
    frozen = frozen_copy(policy)
    live, copied = (gradient(policy, one, RKL, 16) for one in (LiveTeacher(policy), frozen))
    assert relative_error(live, copied) == 0
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    live, copied = (gradient(policy, one, RKL, 16) for one in (LiveTeacher(policy), frozen))
    assert relative_error(live, copied) > 1e-2  # the weights of now, not those of step 0


def test_live_weights_say_nothing_new_after_the_same_prompt(tiny: Callable[..., Any]) -> None:
    method = replace(RKL, policy="off")
    policy = policy_of(tiny, method)
    rollouts, rewards = some_rollouts()
    coefficients = coefficients_of(rewards, method)
    for batch in pack(rollouts, coefficients, 1000):
        policy(batch, torch.ones(()), LiveTeacher(policy)(batch)).loss.backward()
    assert max(p.grad.abs().max() for p in policy.parameters()) < 1e-12


def test_live_weights_under_gradient_checkpointing(tiny: Callable[..., Any]) -> None:
    policy = policy_of(tiny, RKL)
    plain = gradient(policy, LiveTeacher(policy), RKL, 16)
    checkpoint_activations(policy.model)
    policy.train()
    assert relative_error(gradient(policy, LiveTeacher(policy), RKL, 16), plain) <= 1e-12


def test_what_rounding_takes_from_an_average_is_bounded(tiny: Callable[..., Any]) -> None:
    """Half of the distance between float32 numbers below 1 is 3e-8: a step of less is lost."""
    policy = Policy(tiny("qwen2", seed=1), RKL)
    average = EmaTeacher(deepcopy(policy.model), decay=0.99)
    moved = average.model.get_decoder().norm.weight, policy.model.get_decoder().norm.weight
    exact, bound = moved[0].double().clone(), 2**-24 / (1 - 0.99)
    for _ in range(600):
        with torch.no_grad():
            moved[1].sub_(2**-24)
        average.follow(policy)
        exact += (1 - 0.99) * (moved[1].double() - exact)
    error = (moved[0].double() - exact).abs().max().item()
    assert 0.3 * bound < error < bound


def test_an_average_after_n_steps_is_the_one_by_hand(tiny: Callable[..., Any]) -> None:
    policy = Policy(tiny("qwen2", seed=1), RKL)
    average = EmaTeacher(deepcopy(policy.model), decay=0.75)
    start = {name: p.detach().double().clone() for name, p in average.named_parameters()}
    with torch.no_grad():
        for value in (1.0, 2.0, 4.0):
            for parameter in policy.parameters():
                parameter.fill_(value)
            Teachers(("default",), {0: average}).follow(policy)
    # 0.75^3 w_0 + 0.25 (0.75^2 * 1 + 0.75 * 2 + 4)
    for name, parameter in average.named_parameters():
        expected = 0.421875 * start[name] + 1.515625
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in average.parameters())


def test_an_offloaded_average_waits_once_for_the_policys_weights(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(tiny("qwen2", seed=1), RKL)
    near, far = (EmaTeacher(tiny("qwen2", seed=2), decay=0.75) for _ in range(2))
    near.follow(policy)
    with pretend(monkeypatch) as gpu:
        move(policy.model)
        far.follow(policy)
    assert gpu.waits == {"kdrl_train/model/self_teacher.py EmaTeacher.follow: Event.synchronize": 1}
    for name, parameter in near.named_parameters():
        assert torch.equal(far.get_parameter(name), parameter)
