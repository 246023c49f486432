"""Meta tensors and FakeTensors, which have no values, give outputs and gradients of every shape."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kdrl_kernels as kk
from tests.kernels.params import BF16, F32

N, H, V, H_T = 6, 4, 9, 3


def _linear_logprobs(_: dict[str, Tensor], used: Tensor | None, **options: Any) -> Any:
    ids = torch.zeros(N, 2, dtype=torch.int64, device=options["hidden"].device)
    return kk.linear_logprobs(mask=used, entropy=True, extra_tokens=ids, rest=True, **options)


def _kdrl_loss(rows: dict[str, Tensor], used: Tensor | None, **options: Any) -> Any:
    return kk.kdrl_loss(
        token_weights=used,
        teacher=kk.TeacherHead(rows["t_hidden"], rows["t_weight"]),
        objective=kk.Objective(kd="rkl"),
        advantages=rows["advantages"],
        normalizer=rows["normalizer"] if used is None else None,
        **options,
    )


def _linear_token_loss(rows: dict[str, Tensor], used: Tensor | None, **options: Any) -> Any:
    return kk.linear_token_loss(
        loss_fn=lambda x: x.kl - rows["advantages"][x.index] * x.logprobs + x.rest_logprob,
        extra_tokens=torch.zeros(N, 2, dtype=torch.int64, device=options["hidden"].device),
        rest=True,
        kl="rkl",
        token_weights=used,
        teacher=kk.TeacherHead(rows["t_hidden"], rows["t_weight"]),
        normalizer=rows["normalizer"] if used is None else None,
        **options,
    )


def _solve(
    function: Callable[..., Any], impl: str | None, masked: bool, dtype: torch.dtype, device: str
) -> dict[str, tuple[Any, ...]]:
    """Return shape, dtype and device of every output and gradient."""
    sizes = {"hidden": (N, H), "weight": (V, H), "bias": (V,), "t_hidden": (N, H_T)}
    sizes |= {"t_weight": (V, H_T), "advantages": (N,)}
    x = {k: torch.ones(size, dtype=dtype, device=device) for k, size in sizes.items()}
    x["normalizer"] = torch.ones((), device=device)
    student = {name: x[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    result = function(
        x,
        torch.ones(N, device=device) if masked else None,
        tokens=torch.zeros(N, dtype=torch.int64, device=device),
        temperature=torch.ones(N, device=device),
        impl=impl,
        **student,
    )
    outputs = {field.name: getattr(result, field.name) for field in fields(result)}
    outputs |= outputs.pop("metrics", {})
    (outputs["loss"] if "loss" in outputs else result.logprobs.sum()).backward()
    outputs |= {f"d{name}": tensor.grad for name, tensor in student.items()}
    return {
        name: (list(value.shape), value.dtype, value.device.type)
        for name, value in outputs.items()
        if value is not None
    }


@pytest.mark.parametrize("function", [_linear_logprobs, _kdrl_loss, _linear_token_loss])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("impl", ["reference", "torch", None])
@pytest.mark.parametrize("dtype", [F32, pytest.param(BF16, marks=pytest.mark.slow)], ids=str)
def test_shapes_are_those_of_a_call_with_values(
    dtype: torch.dtype, impl: str | None, masked: bool, function: Callable[..., Any]
) -> None:
    expected = _solve(function, impl, masked, dtype, "cpu")
    assert {"dhidden", "dweight", "dbias", "logprobs"} <= expected.keys()
    with FakeTensorMode():
        assert _solve(function, impl, masked, dtype, "cpu") == expected
    on_meta = {name: (*shape_and_dtype, "meta") for name, (*shape_and_dtype, _) in expected.items()}
    for mode in (nullcontext(), FakeTensorMode()):
        with mode:
            assert _solve(function, impl, masked, dtype, "meta") == on_meta


def test_a_loss_of_the_wrong_shape_is_refused_without_values_too() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"\[C\] with C = 6, got \[\]"):
        kk.linear_token_loss(
            torch.ones(N, H).requires_grad_(),
            torch.ones(V, H),
            torch.zeros(N, dtype=torch.int64),
            lambda rows: rows.logprobs.sum(),
        )
