"""A float32 weight meets 16-bit hidden states, and the reverse; gradients keep their dtypes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import BF16, F16, F32, IMPLS
from tests.tolerance import assert_matches

N, H, V = 9, 16, 37
Inputs = dict[str, Tensor]
ON_GPU = pytest.mark.gpu  # the interpreter gets bfloat16 wrong
PAIRS = [
    pytest.param("torch", BF16, F32, id="torch-bfloat16-float32"),
    pytest.param("torch", F16, F32, id="torch-float16-float32"),
    pytest.param("torch", F32, BF16, id="torch-float32-bfloat16"),
    pytest.param("triton", F16, F32, id="triton-float16-float32", marks=pytest.mark.slow),
    pytest.param("triton", BF16, F32, id="triton-bfloat16-float32", marks=ON_GPU),
    pytest.param("reference", BF16, F32, id="reference-bfloat16-float32"),
]


def _inputs(hidden: torch.dtype, weight: torch.dtype, device: str) -> Inputs:
    rng = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    bias, t_bias = torch.where(torch.arange(V) == 3, -torch.inf, randn(2, V))
    inputs = {"hidden": randn(N, H).to(hidden), "weight": randn(V, H).to(weight)}
    inputs |= {"bias": bias.to(weight), "t_hidden": randn(N, H).to(hidden)}
    inputs |= {"t_weight": randn(V, H).to(weight), "t_bias": t_bias.to(weight)}
    inputs["tokens"] = torch.arange(N) + 5
    inputs["advantages"] = randn(N)
    return {name: value.to(device) for name, value in inputs.items()}


def _kdrl(x: Inputs, impl: str) -> Tensor:
    teacher = kk.TeacherHead(x["t_hidden"], x["t_weight"], x["t_bias"])
    student = x["hidden"], x["weight"], x["tokens"]
    objective = kk.Objective(kd="fkl", kd_coef=0.5)
    options = {"objective": objective, "bias": x["bias"], "impl": impl}
    return kk.kdrl_loss(*student, advantages=x["advantages"], teacher=teacher, **options).loss


def _logprobs(x: Inputs, impl: str) -> Tensor:
    student = x["hidden"], x["weight"], x["tokens"]
    lp = kk.linear_logprobs(*student, bias=x["bias"], impl=impl).logprobs
    return -(lp * x["advantages"]).mean()


def _token_loss(x: Inputs, impl: str) -> Tensor:
    def loss_fn(rows: kk.Rows) -> Tensor:
        return -rows.logprobs * x["advantages"][rows.index]

    student = x["hidden"], x["weight"], x["tokens"]
    return kk.linear_token_loss(*student, loss_fn, bias=x["bias"], impl=impl).loss


CALLS = {"kdrl_loss": _kdrl, "linear_logprobs": _logprobs, "linear_token_loss": _token_loss}


def _solve(loss: Callable[[Inputs, str], Tensor], inputs: Inputs, impl: str) -> Inputs:
    leaves = {k: inputs[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    value = loss(inputs | leaves, impl)
    (value * 0.7).backward()
    return {"loss": value.detach()} | {f"d{k}": v.grad for k, v in leaves.items()}


@pytest.mark.parametrize("loss", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("impl", "hidden", "weight"), PAIRS)
def test_matches_the_rounded_weight_in_float64(
    impl: str,
    hidden: torch.dtype,
    weight: torch.dtype,
    loss: Callable[[Inputs, str], Tensor],
    device: str,
) -> None:
    """The same call with that weight gives the same bits, up to the rounding of the gradients.

    But on a GPU a loss of one chunk writes a bfloat16 dW at once: it scales before it rounds dz.
    """
    inputs = _inputs(hidden, weight, device)
    ours = _solve(loss, inputs, impl)
    for name in ("hidden", "weight", "bias"):
        assert ours[f"d{name}"].dtype == inputs[name].dtype, name
    rounded = {k: v.to(hidden) if v.is_floating_point() else v for k, v in inputs.items()}
    rounded["advantages"] = inputs["advantages"]

    def reference(dtype: torch.dtype) -> Inputs:
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in rounded.items()}
        return _solve(loss, cast, "reference")

    at_once = device == "cuda" and hidden == torch.bfloat16 and loss is not _logprobs
    for name, value in _solve(loss, rounded, impl).items():
        assert at_once or torch.equal(
            ours[name].to(hidden).to(weight), value.to(hidden).to(weight)
        ), name
    narrow = weight if hidden == F32 else hidden
    # a 16-bit dz rounds what is added: so gradients are right to its bits, whatever their dtype
    assert_matches({k: v.to(narrow) if k != "loss" else v for k, v in ours.items()}, reference)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("loss", CALLS.values(), ids=CALLS)
def test_the_gradient_of_a_master_weight_is_never_rounded_to_16_bits(
    loss: Callable[[Inputs, str], Tensor], impl: str
) -> None:
    """A product of two numbers of 8 bits, or a sum of them, has more bits than bfloat16."""
    inputs = _inputs(BF16, F32, "cpu")
    gradient = _solve(loss, inputs, impl)["dweight"]
    share = (gradient != gradient.to(BF16).float()).float().mean()
    assert share > 0.9


@pytest.mark.parametrize("hidden", [F16, F32], ids=["float16", "float32"])
@pytest.mark.parametrize("impl", IMPLS)
def test_temperatures_in_float64_change_no_dtype(
    impl: str, hidden: torch.dtype, device: str
) -> None:
    """Powers of 2 divide exactly, so the bits are those of float32 temperatures."""
    inputs = _inputs(hidden, hidden, device)
    temperature = torch.tensor([0.5, 1, 2], device=device).repeat(3)
    results = []
    for dtype in (torch.float64, F32):
        leaves = {k: inputs[k].clone().requires_grad_() for k in ("hidden", "weight")}
        out = kk.linear_token_loss(
            *(*leaves.values(), inputs["tokens"]),
            lambda rows: rows.lse.square() - rows.logprobs - rows.entropy * rows.kl,
            teacher=kk.TeacherHead(
                inputs["t_hidden"], inputs["t_weight"], temperature=temperature.to(dtype)
            ),
            kl="rkl",
            lse=True,
            entropy=True,
            temperature=temperature.to(dtype),
            impl=impl,
        )
        out.loss.backward()
        rows = {name: getattr(out, name) for name in ("loss", "logprobs", "lse", "kl", "entropy")}
        results.append(rows | {f"d{k}": v.grad for k, v in leaves.items()})
    for name, value in results[1].items():
        assert torch.equal(results[0][name], value), name
        assert results[0][name].dtype == value.dtype, name


@pytest.mark.slow  # the compiler costs seconds
def test_a_compiled_caller_gives_the_same() -> None:
    inputs: dict[str, Any] = _inputs(BF16, F32, "cpu")
    compiled = torch.compile(_logprobs, fullgraph=True, backend="aot_eager")
    ours = _solve(compiled, inputs, "torch")
    for name, value in _solve(_logprobs, inputs, "torch").items():
        assert torch.equal(ours[name], value), name
