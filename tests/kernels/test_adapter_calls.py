"""Adapters under operators, torch.compile, batches, shapes alone, and in forms that are refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import kdrl_kernels as kk
from kdrl_kernels import adapter as adapter_op
from kdrl_kernels.operators import logprobs as logprobs_op
from kdrl_kernels.operators import loss as loss_op
from tests.kernels.adapters import (
    CALLS,
    TRAINED,
    H,
    N,
    Tensors,
    V,
    adapted,
    assert_near,
    each_call,
    exact_kd_call,
    logprobs_call,
    make,
    solve,
    token_loss_call,
)
from tests.kernels.params import BF16, F32, F64


@pytest.mark.parametrize("call", [exact_kd_call, logprobs_call])
def test_operators_pass_the_checks_of_pytorch(
    call: Callable[..., Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[tuple[Any, tuple[Any, ...]]]()
    for module, name in (
        (adapter_op, "_widened"),
        (adapter_op, "_widened_backward"),
        (loss_op, "_loss"),
        (logprobs_op, "_linear_logprobs"),
        (logprobs_op, "_linear_logprobs_backward"),
    ):
        operator = getattr(module, name)

        def record(*args: Any, operator: Any = operator) -> Any:
            calls.append((operator, args))
            return operator(*args)

        monkeypatch.setattr(module, name, record)
    transposed = {k: v.T.contiguous().T if v.ndim == 2 else v for k, v in make(F32).items()}
    solve(call, transposed, impl="torch")
    assert len(calls) == (4 if call is logprobs_call else 3)
    for operator, args in calls.copy():  # the checks call them again
        trained = "backward" not in operator._name
        copies = torch.utils._pytree.tree_map_only(
            Tensor,
            lambda x, on=trained: x.detach().clone().requires_grad_(on and x.requires_grad),
            args,
        )
        outcomes = torch.library.opcheck(operator, copies)
        assert set(outcomes.values()) == {"SUCCESS"}, operator


@pytest.mark.parametrize("call", [exact_kd_call, logprobs_call])
def test_a_compiled_caller_is_one_graph(call: Callable[..., Tensors]) -> None:
    torch.compiler.reset()
    x = make(F64)
    x["weights"] = torch.ones(N, dtype=F64)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_near(solve(compiled, x), solve(call, x), 1e-12)


@pytest.mark.parametrize("impl", ["reference", "torch", None])
@each_call
def test_shapes_without_values(call: Callable[..., Tensors], impl: str | None) -> None:
    def shapes(x: Tensors) -> dict[str, Any]:
        return {k: (v.shape, v.dtype) for k, v in solve(call, x, impl=impl).items()}

    expected = shapes(make(BF16))
    with FakeTensorMode() as fake:
        assert shapes({k: fake.from_tensor(v) for k, v in make(BF16).items()}) == expected
    assert shapes({k: v.to("meta") for k, v in make(BF16).items()}) == expected


@each_call
def test_batches(call: Callable[..., Tensors]) -> None:
    x = make(F64)
    flat = solve(call, x)
    names = ("hidden", "t_hidden", "tokens", "advantages", "old", "weights")
    if call is token_loss_call:
        names = ("hidden", "tokens", "weights")  # its loss reads advantages by the flat index
    batch = x | {name: x[name].unflatten(0, (3, 3)) for name in names}
    options = (
        {"temperature": torch.linspace(0.5, 1.5, N).view(3, 3)} if call is logprobs_call else {}
    )
    ours = solve(call, batch, **options)
    assert_near({k: v.reshape(flat[k].shape) for k, v in ours.items()}, flat, 1e-12)


# PyTorch loads its forward mode with a function that it calls deprecated
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
@each_call
def test_a_tangent_raises(call: Callable[..., Tensors], impl: str, name: str) -> None:
    x = make(F32)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="must not carry tang"):
        call(x, adapted(x | {name: forward_ad.make_dual(x[name], x[name])}), impl=impl)


def _differentiate_twice(loss: Tensor, leaves: list[Tensor]) -> None:
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves)


@pytest.mark.parametrize("backward", ["exact", "sketch"])
@each_call
def test_a_second_derivative_raises(call: Callable[..., Tensors], backward: str) -> None:
    x = make(F32)
    leaves = {name: x[name].requires_grad_() for name in TRAINED}
    loss = call(x, adapted(x), backward=backward)["loss"]
    with pytest.raises(RuntimeError, match=r"second derivative|no autograd formula"):
        _differentiate_twice(loss, list(leaves.values()))


@each_call
def test_a_weight_that_is_trained_is_refused(call: Callable[..., Tensors]) -> None:
    x = make(F32)
    x["weight"].requires_grad_()
    for impl in ("torch", "reference"):
        with pytest.raises(ValueError, match=r"weight must not need a gradient beside an adapter.*"
                           r"weight\.requires_grad_\(False\)"):  # fmt: skip
            call(x, adapted(x), impl=impl)
        with torch.no_grad():  # as of a DTensor, which is gathered without a gradient then
            call(x, adapted(x), impl=impl)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "H": ({"A": torch.ones(3, 5)}, ValueError, r"adapter.A must be \[r, H\] with H = 12, got"),
    "V": ({"B": torch.ones(5, 3)}, ValueError, r"adapter.B must be \[V, r\] with V = 37, got"),
    "r": ({"B": torch.ones(V, 4)}, ValueError, r"must be \[V, r\] with r = 3.*got \[37, 4\]: pass"),
    "no r": ({"A": torch.ones(0, H), "B": torch.ones(V, 0)}, ValueError, "with r > 0"),
    "float64": ({"A": torch.ones(3, H).double()}, TypeError, "adapter.A must have the dtype of"),
    "integers": ({"B": torch.ones(V, 3).int()}, TypeError, "B of LowRank must be floating point"),
    "a list": ({"A": [1.0]}, TypeError, "A of LowRank must be a tensor, got list"),
    "a module": ({"B": nn.Linear(3, V)}, TypeError, "B of .* got Linear: pass its weight"),
    "device": ({"A": torch.ones(3, H, device="meta")}, ValueError, "adapter.A must be on the dev"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_what_is_no_adapter_is_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    x = make(F32)
    for call in CALLS.values():
        with pytest.raises(error, match=message):
            call(x, adapted(x | changes))


def test_scale_and_kind_are_checked() -> None:
    x = make(F32)
    for scale in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"scale of LowRank must be finite, got {scale}"):
            kk.LowRank(x["A"], x["B"], scale)
    with pytest.raises(TypeError, match="scale of LowRank must be a number, got a tensor"):
        kk.LowRank(x["A"], x["B"], torch.ones(()))  # type: ignore[arg-type]
    for call in CALLS.values():
        with pytest.raises(
            TypeError, match=r"adapter must be a LowRank or None, got tuple: pass kk\.LowRank"
        ):
            call(x, adapted(x) | {"adapter": (x["A"], x["B"])})
