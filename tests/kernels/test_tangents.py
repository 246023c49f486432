"""Transforms of torch.func raise in one line, most of which would give a gradient of 0."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import kdrl_kernels as kk
from tests.kernels.params import IMPLS

# PyTorch loads its forward mode with a function that it calls deprecated
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)
N, H, V = 3, 4, 5
MESSAGE = "must not carry tangents of forward-mode differentiation"
Loss = Callable[..., Tensor]


def _linear_logprobs(impl: str, **tensors: Tensor) -> Tensor:
    return kk.linear_logprobs(tokens=torch.arange(N), impl=impl, **tensors).logprobs


def _kdrl_loss(impl: str, **tensors: Tensor) -> Tensor:
    options = {"advantages": torch.ones(N), "objective": kk.Objective(kd=None)} | tensors
    return kk.kdrl_loss(tokens=torch.arange(N), impl=impl, **options).loss


def _linear_token_loss(impl: str, **tensors: Tensor) -> Tensor:
    return kk.linear_token_loss(
        tokens=torch.arange(N), loss_fn=lambda rows: -rows.logprobs, impl=impl, **tensors
    ).loss


FUNCTIONS = pytest.mark.parametrize("function", [_linear_logprobs, _kdrl_loss, _linear_token_loss])


def _inputs() -> dict[str, Tensor]:
    return {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "bias": torch.zeros(V)}


@FUNCTIONS
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "temperature"])
def test_a_tangent_raises(name: str, impl: str, function: Loss) -> None:
    inputs = _inputs() | {"temperature": torch.ones(N)}
    moved = inputs.pop(name)

    def fn(x: Tensor) -> Tensor:
        return function(impl, **{name: x}, **inputs)

    with pytest.raises(NotImplementedError, match=MESSAGE):
        torch.func.jvp(fn, (moved,), (torch.ones_like(moved),))
    with pytest.raises(NotImplementedError, match=MESSAGE):
        torch.func.jacfwd(fn)(moved)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=MESSAGE):
        fn(forward_ad.make_dual(moved, torch.ones_like(moved)))
    with forward_ad.dual_level():  # no input carries one
        assert fn(moved).isfinite().all()


def test_a_batch_and_other_tensors_raise_too() -> None:
    inputs, advantages = _inputs(), torch.ones(N)
    with pytest.raises(NotImplementedError, match=MESSAGE):
        torch.func.jvp(
            lambda x: _kdrl_loss("torch", advantages=x, **inputs), (advantages,), (advantages,)
        )
    hidden, tokens = inputs.pop("hidden")[None], torch.arange(N)[None]

    def batch(x: Tensor) -> Tensor:
        return kk.linear_logprobs(x, tokens=tokens, **inputs).logprobs

    with pytest.raises(NotImplementedError, match=MESSAGE):
        torch.func.jvp(batch, (hidden,), (hidden,))


@pytest.mark.parametrize("function", [_linear_logprobs, _kdrl_loss])
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_vmap_raises(name: str, function: Loss) -> None:
    """Under vmap a tensor does not say that it needs a gradient: backward() would set none."""
    inputs = _inputs()
    stack = torch.stack([inputs.pop(name)] * 2).requires_grad_()
    with pytest.raises(NotImplementedError, match=r"must not run under torch\.vmap"):
        torch.vmap(lambda x: function("torch", **{name: x}, **inputs))(stack)
    torch.vmap(lambda x: function("reference", **{name: x}, **inputs))(stack).sum().backward()
    assert stack.grad is not None
    assert torch.equal(stack.grad[0], stack.grad[1])
    assert stack.grad.abs().sum() > 0


@FUNCTIONS
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_reverse_transforms_raise_but_for_the_definition(name: str, function: Loss) -> None:
    inputs = _inputs()
    moved = inputs.pop(name)
    leaf = moved.clone().requires_grad_()
    function("torch", **{name: leaf}, **inputs).sum().backward()
    message = r"^(kdrl_loss|linear_\w+) must not run under torch\.func\.grad, vjp or jacrev: use"
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with pytest.raises(NotImplementedError, match=message):
            transform(lambda x: function("torch", **{name: x}, **inputs).sum())(moved)
    ours = torch.func.grad(lambda x: function("reference", **{name: x}, **inputs).sum())(moved)
    torch.testing.assert_close(ours, leaf.grad)


@FUNCTIONS
def test_a_compiled_caller_raises(function: Any) -> None:
    torch.compiler.reset()
    inputs = _inputs()
    hidden = inputs.pop("hidden")
    compiled = torch.compile(lambda x: function("torch", hidden=x, **inputs), backend="eager")
    with pytest.raises(NotImplementedError, match=MESSAGE):
        torch.func.jvp(compiled, (hidden,), (torch.ones_like(hidden),))
