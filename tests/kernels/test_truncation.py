"""Log-probabilities after a sampler's top-k and top-p match those over the tokens that are kept."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels.truncation import lowest_kept
from tests.kernels.params import F32, F64, IMPL_DTYPES, IMPLS
from tests.tolerance import assert_matches

N, H, V = 12, 16, 70
TRUNCATIONS = {
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "both": {"top_k": 20, "top_p": 0.9},
    "one_token": {"top_p": 1e-6},
    "everything": {"top_k": V, "top_p": 1.0},
}
Inputs = dict[str, Tensor]


def _kept(inputs: Inputs, top_k: int | None, top_p: float | None) -> Tensor:
    """Return which columns are kept, [N, V], as transformers and vLLM do it, and the row's token.

    Sorted upwards, those up to a sum of 1 - top_p go, but for the last.
    """
    z = inputs["hidden"].double() @ inputs["weight"].double().T + inputs["bias"].double()
    z = z / inputs["temperature"].double()[:, None]
    if top_k is not None:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, index = z.sort(dim=1)
        left_out = ordered.softmax(dim=1).cumsum(dim=1) <= 1 - top_p
        left_out[:, -1] = False
        z = z.masked_fill(left_out.scatter(1, index, left_out), -torch.inf)
    return (z > -torch.inf).scatter(1, inputs["tokens"][:, None], True)


def _inputs(dtype: torch.dtype, device: str) -> Inputs:
    rng = torch.Generator().manual_seed(0)
    inputs = {"hidden": torch.randn(N, H, generator=rng)}
    inputs |= {"weight": torch.randn(V, H, generator=rng) / 2, "bias": torch.linspace(0, 2, V)}
    logits = inputs["hidden"] @ inputs["weight"].T + inputs["bias"]
    tokens = logits.argmax(dim=1)
    tokens[1::3] = logits.topk(3, dim=1).indices[1::3, 2]  # kept by some truncations
    tokens[2::3] = logits.argmin(dim=1)[2::3]  # by none
    inputs = {k: v.to(dtype) for k, v in inputs.items()}
    inputs |= {"tokens": tokens, "temperature": torch.linspace(0.6, 1.4, N)}
    inputs |= {"t_hidden": torch.randn(N, H, generator=rng).to(dtype)}
    inputs |= {"advantages": torch.randn(N, generator=rng)}
    return {name: value.to(device) for name, value in inputs.items()}


def _with_leaves(inputs: Inputs) -> tuple[Inputs, Inputs]:
    leaves = {k: inputs[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    return inputs | leaves, leaves


def _results(output: Mapping[str, Tensor], leaves: Inputs, advantages: Tensor) -> Inputs:
    loss = output["logprobs"] @ advantages + output["entropy"].square().sum()
    loss.backward()
    results = {name: value.detach() for name, value in output.items()}
    return results | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def _ours(inputs: Inputs, impl: str, truncation: kk.Truncation | None, **options: Any) -> Inputs:
    x, leaves = _with_leaves(inputs)
    names = ("hidden", "weight", "tokens", "bias", "temperature")
    options = {"truncation": truncation, "entropy": True, "impl": impl} | options
    out = kk.linear_logprobs(**{name: x[name] for name in names}, **options)
    output = {"logprobs": out.logprobs, "entropy": out.entropy}
    return _results(output, leaves, x["advantages"].to(out.logprobs))


def _plain(inputs: Inputs, kept: Tensor) -> Inputs:
    """Solve by autograd over the kept columns alone."""
    x, leaves = _with_leaves(inputs)
    z = (x["hidden"] @ x["weight"].T + x["bias"]) / x["temperature"][:, None]
    logp = torch.where(kept, z, -torch.inf).log_softmax(dim=1)
    entropy = -torch.where(kept, logp.exp() * torch.where(kept, logp, 0), 0).sum(dim=1)
    logprobs = logp.gather(1, x["tokens"][:, None]).squeeze(1)
    return _results({"logprobs": logprobs, "entropy": entropy}, leaves, x["advantages"])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[] if name == "both" else [pytest.mark.slow])
        for name, options in TRUNCATIONS.items()
    ],
)
@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
def test_matches_a_sort(
    impl: str, dtype: torch.dtype, options: dict[str, Any], device: str
) -> None:
    inputs = _inputs(dtype, device)
    kept = _kept(inputs, options.get("top_k"), options.get("top_p"))
    assert_matches(
        _ours(inputs, impl, kk.Truncation(**options)),
        lambda dtype: _plain(
            {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}, kept
        ),
    )


@pytest.mark.parametrize("cached", [0, 10**9], ids=["projected_again", "cached"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_small_chunks_give_the_same(impl: str, cached: int, device: str) -> None:
    inputs, truncation = _inputs(F32, device), kk.Truncation(top_k=20, top_p=0.9)
    whole = _ours(inputs, impl, truncation)
    budget = {"workspace_bytes": 4 * 128 * (5 + 6 * 5) + 5 * H * 12, "cache_bytes": cached}
    for name, value in _ours(inputs, impl, truncation, **budget).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("impl", IMPLS)
def test_losses_read_the_truncated_distribution(impl: str, device: str) -> None:
    """PG, rkl and entropy over the kept tokens; a masked row stays 0; both losses agree."""
    inputs = _inputs(F32, device)
    truncation, weights = kk.Truncation(top_k=9), torch.ones(N, device=device)
    weights[4] = 0
    old = kk.linear_logprobs(
        *(inputs[name] for name in ("hidden", "weight", "tokens")), truncation=truncation
    ).logprobs
    x, leaves = _with_leaves(inputs)
    weight = inputs["weight"].flip(0)
    common: dict[str, Any] = {
        "token_weights": weights,
        "teacher": kk.TeacherHead(inputs["t_hidden"], weight),
        "truncation": truncation,
        "bias": x["bias"],
        "entropy": True,
        "impl": impl,
    }
    A = inputs["advantages"]
    student = x["hidden"], x["weight"], x["tokens"]
    objective = kk.Objective(policy="none", kd="rkl", kd_coef=0.5, kd_ratio_cap=1.0)
    options = {"advantages": A, "objective": objective, "old_logprobs": old - 5}
    ours = kk.kdrl_loss(*student, **options, **common)
    ours.loss.backward()

    y, others = _with_leaves(inputs)
    kept = _kept(inputs | {"temperature": torch.ones(N, device=device)}, 9, None)
    z = torch.where(kept, y["hidden"] @ y["weight"].T + y["bias"], -torch.inf)
    logp, logq = z.log_softmax(1), (inputs["t_hidden"] @ weight.T).log_softmax(1)
    kl = torch.where(kept, logp.exp() * (torch.where(kept, logp, 0) - logq), 0).sum(1)
    lp = logp.gather(1, y["tokens"][:, None]).squeeze(1)
    ratio = (lp - old + 5).exp()
    loss = (weights * (-A * ratio + 0.5 * ratio.detach().clamp(max=1) * kl)).sum() / weights.sum()
    loss.backward()
    torch.testing.assert_close(ours.loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.kl, (kl * weights).detach(), rtol=1e-5, atol=1e-5)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, others[name].grad, rtol=1e-4, atol=1e-4, msg=name)
    out = kk.linear_token_loss(*student, lambda rows: -rows.logprobs + rows.entropy, **common)
    assert torch.equal(out.logprobs, ours.logprobs)
    assert torch.equal(out.entropy, ours.entropy)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_by_hand(impl: str, device: str) -> None:
    """p = (0.5, 0.25, 0.15, 0.1): 0.5 < 0.6, so two are kept, and the token of the row."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.1], device=device)
    hidden = p.log().expand(4, 4).clone().requires_grad_()
    out = kk.linear_logprobs(
        hidden,
        torch.eye(4, device=device),
        torch.arange(4, device=device),
        truncation=kk.Truncation(top_p=0.6),
        impl=impl,
    )
    expected = torch.tensor([0.5 / 0.75, 0.25 / 0.75, 0.15 / 0.9, 0.1 / 0.85], device=device)
    torch.testing.assert_close(out.logprobs.exp(), expected)
    out.logprobs.sum().backward()
    assert (hidden.grad[0, 2:] == 0).all()
    assert (hidden.grad[2, 3] == 0).all()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_bound_of_top_p_is_exact(dtype: torch.dtype) -> None:
    """Against a sort: of each row the fewest that hold top_p, with ties, zeros and one-hot rows."""
    torch.manual_seed(0)
    p = torch.softmax(torch.randn(40, 33, dtype=dtype) * 3, dim=1)
    p[0], p[1] = 1 / 33, torch.eye(33, dtype=dtype)[4]
    p[2, :30] = 0
    p[2] /= p[2].sum()
    for top_p in (1e-9, 0.3, 0.5, 0.9, 0.999):
        values = p.sort(dim=1, descending=True).values
        before = values.cumsum(dim=1) - values
        count = (before < top_p - 1e-6).sum(dim=1).clamp_min(1)
        expected = values.gather(1, count[:, None] - 1)
        assert torch.equal(lowest_kept(p, top_p), expected), top_p


def test_none_and_one_that_keeps_all_are_the_same() -> None:
    inputs = _inputs(F32, "cpu")
    plain = _ours(inputs, "torch", None)
    for options in ({}, {"top_p": 1.0}, {"top_k": V}):
        for name, value in _ours(inputs, "torch", kk.Truncation(**options)).items():
            assert torch.equal(value, plain[name]), (options, name)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_that_a_bias_forbids_keeps_its_gradient(impl: str, device: str) -> None:
    """Token 2 is kept, with p = 1, and token 3, which was drawn: dlp/dz is -1 and 1 there."""
    hidden = torch.tensor([[0.0, 1.0, 2.0, 3.0]], device=device, requires_grad=True)
    bias = torch.tensor([0, 0, 0, -torch.inf], device=device)
    out = kk.linear_logprobs(
        *(hidden, torch.eye(4, device=device), torch.tensor([3], device=device)),
        bias=bias,
        truncation=kk.Truncation(top_k=1),
        impl=impl,
    )
    out.logprobs.sum().backward()
    assert out.logprobs.tolist() == [-torch.inf]
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[0, 0, -1, 1]]


@pytest.mark.slow  # the compiler costs seconds
def test_a_compiled_caller_keeps_one_graph() -> None:
    inputs, truncation = _inputs(F32, "cpu"), kk.Truncation(top_k=20, top_p=0.9)
    compiled = torch.compile(_forward, fullgraph=True, backend="eager")
    assert torch.equal(compiled(inputs, truncation), _forward(inputs, truncation))


def _forward(inputs: Inputs, truncation: kk.Truncation) -> Tensor:
    names = ("hidden", "weight", "tokens")
    return kk.linear_logprobs(*(inputs[k] for k in names), truncation=truncation).logprobs


# ruff: noqa: E501 (a table, one case a line)
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"top_k": 0}, ValueError, "top_k must be at least 1 or None, got 0"),
    ({"top_k": 2.5}, TypeError, "top_k must be an integer or None, got 2.5"),
    ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\] or None, got 0.0"),
    ({"top_p": 1.1}, ValueError, r"top_p must be in \(0, 1\] or None, got 1.1"),
    ({"top_p": float("nan")}, ValueError, r"top_p must be in \(0, 1\] or None, got nan"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), ERRORS, ids=[m for *_, m in ERRORS])
def test_numbers(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kk.Truncation(**options)


CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"softcap": 30.0}, ValueError, r"truncation must be None with a softcap, got Truncation\(top_k=5, top_p=None\): a softcap makes the -inf"),
    ({"objective": kk.Objective(kd="fkl")}, ValueError, r"truncation must be None for 'fkl', got Truncation\(.*\): KL\(q‖p\) is infinite"),
    ({"truncation": 5}, TypeError, r"truncation must be a Truncation or None, got int: pass kk\.Truncation"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), CALLS, ids=[m[:40] for *_, m in CALLS])
def test_what_does_not_go_together(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    x = _inputs(F32, "cpu")
    options = {"truncation": kk.Truncation(top_k=5), "advantages": x["advantages"]} | changes
    teacher = kk.TeacherHead(x["t_hidden"], x["weight"])
    with pytest.raises(error, match=message):
        kk.kdrl_loss(x["hidden"], x["weight"], x["tokens"], teacher=teacher, **options)
