"""Makes heads with an adapter, and solves them by every public function, adapted or merged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.tolerance import relative_error

N, H, V, R, SCALE = 9, 12, 37, 3, 1.7
TRAINED = ("hidden", "A", "B", "bias")

Tensors = dict[str, Tensor]


def make(dtype: torch.dtype, device: str = "cpu", r: int = R) -> Tensors:
    """Return hidden states, a head, an adapter of rank r, a teacher and its tokens."""
    rng = torch.Generator().manual_seed(r)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    x = {"hidden": randn(N, H), "weight": randn(V, H) / 2, "A": randn(r, H) / 3, "B": randn(V, r)}
    x |= {"bias": torch.linspace(0, 2, V), "t_hidden": randn(N, 5), "t_weight": randn(V, 5)}
    x |= {"advantages": randn(N), "old": randn(N) - 3, "weights": torch.rand(N, generator=rng)}
    x["weights"][[2, 5]] = 0
    x["advantages"][3] = 0
    cast = {name: value.to(device, dtype) for name, value in x.items()}
    return cast | {"tokens": torch.randint(V, (N,), generator=rng).to(device)}


def kdrl_call(x: Tensors, head: dict[str, Any], **options: Any) -> Tensors:
    objective = kk.Objective(kd=None)
    rows = {"advantages": x["advantages"], "old_logprobs": x["old"], "token_weights": x["weights"]}
    out = kk.kdrl_loss(tokens=x["tokens"], objective=objective, **rows, **head, **options)
    return {"loss": out.loss, "logprobs": out.logprobs}


def exact_kd_call(x: Tensors, head: dict[str, Any], **options: Any) -> Tensors:
    teacher = kk.TeacherHead(x["t_hidden"], x["t_weight"])
    out = kk.kdrl_loss(
        tokens=x["tokens"],
        advantages=x["advantages"],
        teacher=teacher,
        objective=kk.Objective(kd="rkl", kd_coef=0.5, entropy_coef=0.1),
        **head,
        softcap=4.0,
        temperature=0.7,
        **options,
    )
    return {"loss": out.loss, "kl": out.kl, "entropy": out.entropy}


def logprobs_call(x: Tensors, head: dict[str, Any], **options: Any) -> Tensors:
    temperature = torch.linspace(0.5, 1.5, N, device=x["tokens"].device)
    options = {"mask": x["weights"] > 0, "entropy": True, "temperature": temperature} | options
    out = kk.linear_logprobs(tokens=x["tokens"], **head, **options)
    loss = (out.logprobs * x["advantages"] + out.entropy * x["old"]).sum()
    return {"loss": loss, "logprobs": out.logprobs.detach(), "entropy": out.entropy.detach()}


def token_loss_call(x: Tensors, head: dict[str, Any], **options: Any) -> Tensors:
    def loss_fn(rows: kk.Rows) -> Tensor:
        return -rows.logprobs * x["advantages"][rows.index] + rows.lse.square() / 100

    weights = x["weights"]
    out = kk.linear_token_loss(
        tokens=x["tokens"], loss_fn=loss_fn, token_weights=weights, lse=True, **head, **options
    )
    return {"loss": out.loss, "logprobs": out.logprobs, "lse": out.lse}


CALLS = {
    "kdrl": kdrl_call,
    "exact kd": exact_kd_call,
    "logprobs": logprobs_call,
    "token loss": token_loss_call,
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def adapted(x: Tensors) -> dict[str, Any]:
    """Return the arguments of a head with its adapter."""
    adapter = kk.LowRank(x["A"], x["B"], SCALE)
    return {"hidden": x["hidden"], "weight": x["weight"], "bias": x["bias"], "adapter": adapter}


def merged(x: Tensors) -> dict[str, Any]:
    """Return those of the head that the adapter makes."""
    weight = x["weight"] + SCALE * x["B"] @ x["A"]
    return {"hidden": x["hidden"], "weight": weight, "bias": x["bias"]}


def widened(x: Tensors, dtype: torch.dtype) -> dict[str, Any]:
    """Return those of the wider head, whose new columns of hidden are rounded to dtype."""
    narrow = SCALE * x["hidden"].double() @ x["A"].double().T
    narrow = narrow + (narrow.to(dtype).double() - narrow).detach()
    wide = torch.cat([x["hidden"], narrow.to(x["hidden"].dtype)], dim=1)
    return {"hidden": wide, "weight": torch.cat([x["weight"], x["B"]], 1), "bias": x["bias"]}


def solve(
    call: Callable[..., Tensors],
    x: Tensors,
    head: Callable[[Tensors], dict[str, Any]] = adapted,
    **options: Any,
) -> Tensors:
    """Return outputs and gradients of 0.7 · loss."""
    leaves = {name: x[name].detach().clone().requires_grad_() for name in TRAINED}
    x = x | leaves
    results = call(x, head(x), **options)
    (0.7 * results["loss"]).backward()
    return {k: v.detach() for k, v in results.items()} | {f"d{k}": x[k].grad for k in leaves}


def assert_near(ours: Tensors, expected: Tensors, tolerance: float) -> None:
    """Assert that tensors of the same names agree, relative to the largest element."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(ours[name], value.to(ours[name].dtype)) <= tolerance, name
