"""loss_trial: mistakes of a loss of one's own are named before anything is loaded."""

import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_kernels import Rows
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.loss_trial import try_loss
from kdrl_train.method.losses import TokenCoefficients, completion_mean
from kdrl_train.method.own_loss import token_loss
from tests.train import own_losses

Loss = Callable[[Rows, TokenCoefficients], Any]
HERE = own_losses.__name__


def policy_gradient(rows: Rows, tokens: TokenCoefficients) -> Tensor:
    return -tokens.advantages * rows.logprobs


def by_sequence(rows: Rows, tokens: TokenCoefficients) -> Tensor:
    assert tokens.sequence is not None
    return -tokens.sequence.exp() * tokens.advantages * rows.logprobs


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """named(function, **declaration) -> the name of a loss for method.loss."""

    def make(function: Loss, **declaration: Any) -> str:
        module = ModuleType("a_users_module")
        module.loss = token_loss(**declaration)(function)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return f"{module.__name__}:loss"

    return make


@pytest.mark.parametrize(
    ("function", "declaration", "message"),
    [
        (lambda r, t: policy_gradient(r, t).mean(), {}, "return one loss a row, [C] with C = 4"),
        (lambda r, t: policy_gradient(r, t).squeeze(), {}, "return one loss a row, [C] with C = 1"),
        (lambda r, _: r.kl, {"kd": "k2"}, "return one loss a row, [C] with C = 4, got NoneType"),
        (lambda r, _: 1 - r.logprobs.detach(), {}, "return losses with a gradient"),
        (
            lambda r, _: -r.entropy,
            {},
            "take rows with what it has declared in token_loss, got TypeE",
        ),
        (
            lambda r, t: policy_gradient(r, t) - policy_gradient(r, t).mean(),
            {},
            "compute the loss of a row from that row alone",
        ),
        (
            by_sequence,
            {"sequence": lambda log_ratio, _: log_ratio.mean()},
            "have a sequence function that returns one number a token, [N] with N = 4, got []",
        ),
    ],
    ids=["mean", "squeezed", "no kl", "detached", "not declared", "centred", "sequence"],
)
def test_a_mistake_is_named(
    named: Callable[..., str], function: Loss, declaration: dict[str, Any], message: str
) -> None:
    method = MethodConfig(loss=named(function, **declaration), kd=declaration.get("kd"))
    with pytest.raises(ValueError, match=re.escape(f"method.loss {method.loss} must {message}")):
        try_loss(method)


@pytest.mark.parametrize(
    "method",
    [
        MethodConfig(),
        MethodConfig(loss=f"{HERE}:kdrl"),
        MethodConfig(loss=f"{HERE}:mixture", kd="rkl+fkl"),
        MethodConfig(loss=f"{HERE}:early", kd=None, loss_options={"half_life": 3.0}),
    ],
    ids=["none", "kdrl", "mixture", "early"],
)
def test_a_sound_loss_draws_no_number_of_the_run(method: MethodConfig) -> None:
    before = torch.get_rng_state()
    try_loss(method)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_may_draw_without_changing_the_run(named: Callable[..., str]) -> None:
    def noisy(rows: Rows, tokens: TokenCoefficients) -> Tensor:
        torch.rand(1)
        return policy_gradient(rows, tokens)

    before = torch.get_rng_state()
    try_loss(MethodConfig(loss=named(noisy, sequence=completion_mean), kd=None))
    assert torch.equal(torch.get_rng_state(), before)
