"""The loss for prime-rl: numbers by hand, expected gradients by enumeration, its page."""

import math
import re
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels
from kdrl_kernels.integrations.prime_rl import kdrl

README = (Path(kdrl_kernels.__file__).parent / "integrations" / "README.md").read_text("utf-8")
NAN = math.nan


def inputs(**changes: Any) -> SimpleNamespace:
    """What prime-rl passes: five tokens, of which the mask leaves out the first and the last."""
    fields: dict[str, Any] = {
        "trainer_logprobs": torch.tensor([NAN, -1.0, -2.0, -0.5, NAN], requires_grad=True),
        "inference_logprobs": torch.tensor([NAN, -1.0, -2.0 - math.log(1.5), -0.5, NAN]),
        "ref_logprobs": torch.tensor([NAN, -1.5, -2.0, -4.5, NAN]),
        "advantages": torch.tensor([NAN, 1.0, 1.0, -2.0, NAN]),
        "loss_mask": torch.tensor([False, True, True, True, False]),
        "loss_weights": None,
    } | changes
    return SimpleNamespace(**fields)


def gradient(made: SimpleNamespace, **options: Any) -> list[float]:
    (slope,) = torch.autograd.grad(kdrl(made, **options).loss, made.trainer_logprobs)
    return slope[1:4].tolist()


def test_the_numbers_of_three_tokens() -> None:
    """r = 1, 1.5, 1; l = 0.5, 0, 4. The second is clipped at 1.2 and has no gradient."""
    made = inputs()
    out = kdrl(made, kd_coef=0.1)
    # -1 - 1.2 + 2, and 0.1 (0.5^2 / 2 + 4^2 / 2)
    assert out.loss.item() == pytest.approx(-0.2 + 0.1 * (0.125 + 8), rel=1e-6)
    assert gradient(made, kd_coef=0.1) == pytest.approx([-1 + 0.05, 0, 2 + 0.4], rel=1e-6)
    metrics = {name: value.item() for name, value in out.metrics.items()}
    assert metrics == pytest.approx(
        {"kdrl/ratio": 3.5 / 3, "kdrl/clipped": 1 / 3, "kdrl/teacher_log_ratio": 1.5}, rel=1e-6
    )


def test_a_clamp_bounds_the_pull_and_keeps_it() -> None:
    made = inputs()
    out = kdrl(made, kd_coef=0.1, kd_clamp=1.0)
    assert out.loss.item() == pytest.approx(-0.2 + 0.1 * (0.125 + 0.5), rel=1e-6)
    assert gradient(made, kd_coef=0.1, kd_clamp=1.0) == pytest.approx([-0.95, 0, 2.1], rel=1e-6)
    assert out.metrics["kdrl/kd_clamped"].item() == pytest.approx(1 / 3)
    assert out.metrics["kdrl/teacher_log_ratio"].item() == pytest.approx(1.5)


def test_a_clamp_holds_where_the_reference_forbids_a_token() -> None:
    low = -math.inf
    made = inputs(
        trainer_logprobs=torch.tensor([NAN, -1.0, low, -0.5, NAN], requires_grad=True),
        ref_logprobs=torch.tensor([NAN, low, low, -0.5, NAN]),
    )
    assert gradient(made, policy="off", kd_coef=0.1, kd_clamp=2.0) == pytest.approx([0.2, 0, 0])


def test_the_ratio_weighs_the_kd_up_to_its_cap() -> None:
    made = inputs(ref_logprobs=torch.tensor([NAN, -1.0, -3.0, -0.5, NAN]))
    options = {"policy": "off", "kd_coef": 0.1}
    assert gradient(made, **options) == pytest.approx([0, 0.15, 0], abs=1e-7)
    assert gradient(made, kd_ratio_cap=1.25, **options) == pytest.approx([0, 0.125, 0], abs=1e-7)


def test_a_dual_clip_bounds_a_bad_token_that_became_likelier() -> None:
    """r = e^3 at the last token, whose advantage is -2: dual_clip 3 makes of 2 e^3 a constant 6."""
    older = torch.tensor([NAN, -1.0, -2.0, -3.5, NAN])
    made = inputs(inference_logprobs=older, advantages=torch.tensor([NAN, 0.0, 0.0, -2.0, NAN]))
    assert gradient(made, kd=None) == pytest.approx([0, 0, 2 * math.exp(3)])
    assert kdrl(made, kd=None, dual_clip=3.0).loss.item() == pytest.approx(6)
    assert gradient(made, kd=None, dual_clip=3.0) == [0, 0, 0]


def test_k3_is_linear_beyond_its_bound() -> None:
    """l = -3 at the first token: the slope of exp(-l) - 1 + l, and at the bound of 1."""
    made = inputs(ref_logprobs=torch.tensor([NAN, 2.0, -2.0, -0.5, NAN]))
    options = {"policy": "off", "kd": "k3", "kd_coef": 0.1}
    assert gradient(made, **options) == pytest.approx([0.1 * (1 - math.exp(3)), 0, 0], abs=1e-6)
    bounded = gradient(made, k3_bound=1.0, **options)
    assert bounded == pytest.approx([0.1 * (1 - math.exp(1)), 0, 0], abs=1e-6)


def test_weights_multiply_both_terms() -> None:
    weights = torch.tensor([NAN, 2.0, 1.0, 0.5, NAN])
    made = inputs(loss_weights=weights)
    assert gradient(made, kd_coef=0.1) == pytest.approx([-1.9, 0, 1.2], rel=1e-6)


def test_without_a_kd_no_reference_is_read() -> None:
    made = inputs(ref_logprobs=None)
    assert gradient(made, kd=None) == pytest.approx([-1, 0, 2])
    assert "kdrl/teacher_log_ratio" not in kdrl(made, kd=None).metrics


def test_the_older_name_of_the_reference_is_read() -> None:
    older = inputs()
    older.teacher_logprobs = older.ref_logprobs
    del older.ref_logprobs, older.loss_weights
    assert kdrl(older, kd_coef=0.1).loss.item() == kdrl(inputs(), kd_coef=0.1).loss.item()


def test_a_sequence_without_tokens_has_a_loss_of_0() -> None:
    made = inputs(loss_mask=torch.zeros(5, dtype=torch.bool))
    out = kdrl(made)
    out.loss.backward()
    assert out.loss.item() == 0
    assert made.trainer_logprobs.grad.eq(0).all()
    assert all(value.item() == 0 for value in out.metrics.values())


@pytest.mark.parametrize("stale", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("kd", ["k2", "k3", "k3_ratio"])
def test_the_expected_gradient_is_that_of_reward_and_kl(kd: str, stale: bool) -> None:
    """Every token of a vocabulary of 5, each weighted with the probability to be sampled."""
    rng = torch.Generator().manual_seed(0)
    z, t, old, reward = (torch.randn(5, generator=rng, dtype=torch.float64) for _ in range(4))
    logits, q = z.requires_grad_(), t.log_softmax(0)
    sampler = (z + 0.3 * old if stale else z).detach().log_softmax(0)
    beta, p = 0.3, logits.log_softmax(0)
    expected = 0.0
    for token in range(5):
        made = SimpleNamespace(
            trainer_logprobs=p[token : token + 1],
            inference_logprobs=sampler[token : token + 1],
            ref_logprobs=q[token : token + 1],
            advantages=reward[token : token + 1],
            loss_mask=torch.tensor([True]),
        )
        options = {"kd": kd, "policy": "none", "kd_coef": beta, "kd_ratio_cap": math.inf}
        expected = expected + sampler[token].exp() * kdrl(made, **options).loss
    reverse, forward = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
    objective = -(p.exp() * reward).sum() + beta * (forward if kd == "k3" else reverse)
    ours, exact = (
        torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (expected, objective)
    )
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd": "rkl"}, r"kd must be one of .*'k2'.* or None, got 'rkl': prime-rl has"),
        ({"kd": "k1"}, "k1 as a loss has no teacher"),
        ({"kd_clamp": 0.0}, r"kd_clamp must be positive or None, got 0\.0"),
        ({"kd_coef": -1.0}, "kd_coef must be finite and at least 0"),
    ],
)
def test_options_that_cannot_be_right_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kdrl(inputs(), **options)


def test_inputs_without_a_reference_or_a_field_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ref_logprobs must be set for a kd, got None: take"):
        kdrl(inputs(ref_logprobs=None))
    with pytest.raises(TypeError, match=r"got dict without trainer_logprobs, inference_logprobs"):
        kdrl({})


def test_the_configuration_of_the_page_names_this_function_and_its_arguments() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", README.split("## prime-rl\n")[1], re.DOTALL)
    loss = tomllib.loads(block)["trainer"]["loss"]
    module, name = loss["import_path"].rsplit(".", 1)
    function = getattr(import_module(module), name)
    out: Tensor = function(inputs(), **loss["kwargs"]).loss
    assert function is kdrl
    assert out.item() == kdrl(inputs(), kd_coef=2e-3, kd_clamp=5.0).loss.item()
