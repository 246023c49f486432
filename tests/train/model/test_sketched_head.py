"""A policy with a sketched head: its gradient does not depend on packs, ranks or resumes."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import kdrl_kernels as kk
from kdrl_train.batch import CompletionCoefficients
from kdrl_train.config import ModelConfig, OptimConfig, TrainConfig
from kdrl_train.method.config import ScheduleConfig
from kdrl_train.method.metrics import token_means
from kdrl_train.method.presets import PRESETS
from kdrl_train.model.packing import pack
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.step.update import sketch_scale
from tests.train.coefficients import coefficients_of
from tests.train.model.test_policy import METHODS, pair, some_rollouts, step_gradient
from tests.train.test_train import run, weights, without_times
from tests.train.test_two_ranks import alone, assert_same_metrics, gradient, together


def test_the_setting_reaches_the_loss_and_the_log(config: Callable[..., TrainConfig]) -> None:
    base = config(steps=2, method=PRESETS["grpo"])
    exact = run(replace(base, out=base.out / "exact"))
    model = replace(base.model, head_backward="sketch", head_threshold=0.01, head_flat=1e9)
    rows = run(replace(base, out=base.out / "sketch", model=model))
    assert "sketch_noise" not in exact[0]
    assert rows[0]["loss"] == pytest.approx(exact[0]["loss"], abs=1e-6)
    assert 0 < rows[0]["sketch_noise"] < 1
    assert 1 < rows[0]["sketch_entries"] <= 102
    assert rows[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=rows[0]["sketch_noise"])
    assert rows[0]["grad_norm"] != exact[0]["grad_norm"]


SKETCH = kk.Sketch(threshold=0.1, flat=math.inf)


def sketched(tiny: Callable[..., Any], name: str, **config: Any) -> tuple[Policy, Teacher | None]:
    """Return a policy and a teacher in float64, of which the first sketches with seed 3."""
    policy, teacher = pair(tiny, METHODS[name], torch.float64, "qwen2", **config)
    policy.sketch = SKETCH
    policy.draw_sketch(3)
    return policy, teacher


@pytest.mark.parametrize(
    "name", ["rkl sequence", *(pytest.param(x, marks=pytest.mark.slow) for x in ("k2", "grpo"))]
)
def test_the_gradient_does_not_depend_on_packing(tiny: Callable[..., Any], name: str) -> None:
    gradients = {}
    for budget, seed in ((12, 3), (1000, 3), (1000, 4)):
        policy, teacher = sketched(tiny, name)
        policy.draw_sketch(seed)
        _, parts, _ = step_gradient(policy, teacher, METHODS[name], budget)
        gradients[budget, seed] = torch.cat([part.flatten() for part in parts])
    size = gradients[12, 3].abs().max().item()
    torch.testing.assert_close(gradients[1000, 3], gradients[12, 3], rtol=0, atol=1e-10 * size)
    assert (gradients[1000, 4] - gradients[12, 3]).abs().max() > 1e-3 * size


def test_each_token_of_a_step_has_a_number_of_its_own() -> None:
    rollouts, rewards = some_rollouts()
    coefficients = coefficients_of(rewards, METHODS["grpo"])
    numbers = [
        torch.cat([batch.token_numbers for batch in pack(rollouts, coefficients, budget)])
        for budget in (1, 1000)
    ]
    assert len(numbers[0].unique()) == len(numbers[0]) > 20
    assert torch.equal(numbers[0].sort().values, numbers[1].sort().values)


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_metrics_are_those_of_exact(tiny: Callable[..., Any], name: str) -> None:
    policy, teacher = pair(tiny, METHODS[name], torch.float32, "qwen2")
    exact = step_gradient(policy, teacher, METHODS[name], 12)
    policy.sketch = SKETCH
    ours = step_gradient(policy, teacher, METHODS[name], 12)
    assert ours[0] == exact[0]
    assert {k: v for k, v in ours[2].items() if not k.startswith("sketch_")} == exact[2]
    assert not any(torch.equal(a, b) for a, b in zip(ours[1], exact[1], strict=True) if b.any())


def test_a_tied_head_gets_what_embedding_and_head_get(tiny: Callable[..., Any]) -> None:
    tied, teacher = sketched(tiny, "k2", tie_word_embeddings=True)
    apart, _ = sketched(tiny, "k2", tie_word_embeddings=False)
    apart.model.load_state_dict(tied.model.state_dict())
    names = [name for name, _ in tied.named_parameters()]
    ours = dict(zip(names, step_gradient(tied, teacher, METHODS["k2"], 12)[1], strict=True))
    names = [name for name, _ in apart.named_parameters()]
    parts = dict(zip(names, step_gradient(apart, teacher, METHODS["k2"], 12)[1], strict=True))
    embedding = "model.model.embed_tokens.weight"
    parts[embedding] += parts.pop("model.lm_head.weight")
    assert ours.keys() == parts.keys()
    for key, value in parts.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", ["head", "backbone"])
def test_what_is_frozen_changes_nothing_else(tiny: Callable[..., Any], frozen: str) -> None:
    policy, teacher = sketched(tiny, "rkl sequence", tie_word_embeddings=False)
    names = [name for name, _ in policy.named_parameters()]
    whole = step_gradient(policy, teacher, METHODS["rkl sequence"], 12)[1]
    expected = dict(zip(names, whole, strict=True))
    learnt = [name for name in names if ("lm_head" in name) == (frozen == "backbone")]
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in learnt)
    ours = step_gradient(policy, teacher, METHODS["rkl sequence"], 12)[1]
    for name, value in zip(learnt, ours, strict=True):
        assert torch.equal(value, expected[name]), name
    assert all(p.grad is None for name, p in policy.named_parameters() if name not in learnt)


def test_the_scale_is_that_of_a_usual_coefficient() -> None:
    coefficients = CompletionCoefficients(
        advantages=torch.tensor([3.0, -8.0, torch.nan, 0.0]),
        kd_weight=torch.tensor([4.0, 0.0, 1.0, 0.0]),
        token_weights=torch.tensor([1.0, 0.25, 0.0, 1.0]),
    )
    method = PRESETS["kdrl"]
    assert sketch_scale(coefficients, method) == pytest.approx(((5**2 + 2**2) / 2) ** 0.5)
    assert sketch_scale(coefficients, replace(method, policy="off")) == pytest.approx(4.0)
    nothing = replace(coefficients, token_weights=torch.zeros(4))
    assert sketch_scale(nothing, method) == 1.0


def test_a_small_loss_is_sketched_as_a_large_one(
    config: Callable[..., TrainConfig],
) -> None:
    """Weights of 1 / length, and a small beta alone, would else make the threshold coarse."""
    base = sketching(config(steps=1, method=PRESETS["kd_rkl"]))
    entries = []
    for beta in (1.0, 1e-3):
        method = replace(base.method, kd_coef=ScheduleConfig(initial=beta))
        rows = run(replace(base, out=base.out / str(beta), method=method))
        entries.append(rows[0]["sketch_entries"])
    assert entries[1] == pytest.approx(entries[0], rel=0.02)


def sketching(settings: TrainConfig) -> TrainConfig:
    """Return the settings with a sketched head."""
    model = replace(settings.model, head_backward="sketch", head_threshold=0.05, head_flat=1e9)
    return replace(settings, model=model)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["student", "llama"], ids=["tied", "untied"])
def test_two_ranks_sketch_what_one_process_does(
    config: Callable[..., TrainConfig], policy: str
) -> None:
    settings = {"steps": 3, "save_every": 1, "keep_checkpoints": 3, "policy": policy}
    whole, parts = (sketching(config(out, **settings)) for out in ("whole", "parts"))
    assert_same_metrics(together(parts, 2), alone(whole))
    theirs = gradient(whole)
    for name, ours in gradient(parts).items():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.slow
def test_a_resumed_run_sketches_as_the_uninterrupted_one(
    config: Callable[..., TrainConfig],
) -> None:
    whole, parts = (sketching(config(out, steps=4)) for out in ("whole", "parts"))
    expected = without_times(run(whole))
    run(replace(parts, steps=2))
    assert without_times(run(replace(parts, resume=True))) == expected
    after = weights(whole.out / "model")
    for name, weight in weights(parts.out / "model").items():
        assert torch.equal(weight, after[name]), name


def test_settings_that_do_not_fit_are_refused(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ValueError, match="head_threshold must be in"):
        ModelConfig(head_threshold=2.0)
    optim = OptimConfig(head_impl="reference")
    with pytest.raises(ValueError, match='head_backward must be "exact" with'):
        config(model=ModelConfig(head_backward="sketch"), optim=optim)


def test_means_of_the_sketch() -> None:
    sums = {"entries": 60.0, "tokens": 4.0, "sketch_variance_sum": 0.5, "sketch_square_sum": 8.0}
    means = token_means({name: torch.tensor(value) for name, value in sums.items()})
    assert (means["sketch_entries"], means["sketch_noise"]) == (15.0, 0.25)
    nothing = token_means({name: torch.tensor(0.0) for name in sums} | {"tokens": torch.tensor(4)})
    assert (nothing["sketch_entries"], nothing["sketch_noise"]) == (0.0, None)
