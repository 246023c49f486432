"""linear_logprobs(topk=K): the student's likeliest tokens, with the gradient of their numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels.rows.best_columns import best_columns
from tests.kernels.params import F32, IMPL_DTYPES, IMPLS
from tests.tolerance import assert_matches

N, H = 6, 16


def _sorted(logits: Tensor, K: int) -> Tensor:
    """Return the first K columns of a stable sort of each row, -1 for those of -inf."""
    values, columns = logits.sort(dim=1, descending=True, stable=True)
    return columns.masked_fill(values == -math.inf, -1)[:, :K]


SIZES = [(V, K) for V in (1, 2, 31, 37, 128, 1001, 5000) for K in (1, 2, 7, 37, 512) if K <= V]


@pytest.mark.parametrize(("V", "K"), SIZES)
def test_best_columns(V: int, K: int) -> None:
    """Distinct logits, many equal ones, few finite ones, all equal."""
    rng = torch.Generator().manual_seed(V * K)
    logits = torch.randn(9, V, generator=rng)
    few = torch.rand(9, V, generator=rng) < min(0.9, 2 * K / V)
    cases = logits, logits.round(), torch.where(few, logits.round(), -math.inf), 0 * logits
    for case in cases:
        assert torch.equal(best_columns(case, K), _sorted(case, K))


def test_blocks_of_rows_do_not_matter() -> None:
    logits = torch.randn(700, 1000).mul_(8).round_()  # 262 rows a block
    assert torch.equal(best_columns(logits, 5), _sorted(logits, 5))


@pytest.mark.parametrize("V", [37, 1001])
def test_a_row_of_nan_names_columns_that_exist(V: int) -> None:
    """On a GPU a column out of range would read other memory."""
    columns = best_columns(torch.full((2, V), math.nan), 20)
    assert columns.min() >= -1
    assert columns.max() < V


def _inputs(V: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(V)
    hidden, weight = torch.randn(N, H, generator=rng), torch.randn(V, H, generator=rng)
    return hidden.to(device), weight.to(device), torch.arange(N, device=device) % V


def _solve(V: int, dtype: torch.dtype, device: str, **options: Any) -> dict[str, Tensor]:
    hidden, weight, tokens = _inputs(V, device)
    hidden, weight = (x.to(F32).to(dtype).requires_grad_() for x in (hidden, weight))
    return _results(hidden, weight, tokens, **options)


def _results(hidden: Tensor, weight: Tensor, tokens: Tensor, **options: Any) -> dict[str, Tensor]:
    """Return outputs, and gradients of a loss that reads them all."""
    out = kk.linear_logprobs(hidden, weight, tokens, rest=True, **options)
    scale = torch.linspace(-1, 2, out.topk_logprobs.numel(), device=hidden.device)
    loss = (out.topk_logprobs * scale.view_as(out.topk_logprobs)).sum()
    loss = loss + out.logprobs.sum() - 0.5 * out.rest_logprob.clamp(min=-80).sum()
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    return {
        "topk_logprobs": out.topk_logprobs.detach(),
        "rest_logprob": out.rest_logprob.detach(),
        "dhidden": dhidden,
        "dweight": dweight,
        "topk_tokens": out.topk_tokens,
    }


@pytest.mark.parametrize(("V", "K"), [(37, 1), (37, 5), (600, 16)])
@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
def test_matches_definition(impl: str, dtype: torch.dtype, V: int, K: int, device: str) -> None:
    hidden, weight, tokens = _inputs(V, device)
    inputs = [x.to(dtype) for x in (hidden, weight)]

    def solve(kind: torch.dtype, impl: str) -> dict[str, Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        return _results(*leaves, tokens, topk=K, impl=impl)

    ours = solve(dtype, impl)
    exact = solve(torch.float64, "reference")["topk_tokens"]
    assert torch.equal(ours.pop("topk_tokens"), exact)

    def reference(kind: torch.dtype) -> dict[str, Tensor]:
        results = solve(kind, "reference")
        return {name: results[name] for name in ours}

    assert_matches(ours, reference)


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_logits_come_lowest_first(impl: str, device: str) -> None:
    hidden, weight, tokens = _inputs(40, device)
    weight[30], weight[3] = weight[12], weight[12]
    weight[[1, 2, 5]] = 0
    out = kk.linear_logprobs(hidden, weight, tokens, topk=40, impl=impl)
    logits = hidden.double() @ weight.double().T
    assert torch.equal(out.topk_tokens, _sorted(logits, 40))


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_that_the_sampler_leaves_out_are_none(impl: str, device: str) -> None:
    """Three are kept, and the sampled one: the other places of topk=6 hold -1, and 0."""
    hidden, weight, tokens = _inputs(50, device)
    truncation = kk.Truncation(top_k=3)
    out = kk.linear_logprobs(hidden, weight, tokens, topk=6, truncation=truncation, impl=impl)
    kept = (out.topk_tokens >= 0).sum(dim=1)
    assert kept.min() >= 3
    assert kept.max() <= 4
    assert (out.topk_logprobs[out.topk_tokens < 0] == 0).all()
    mass = out.topk_logprobs.exp().masked_fill(out.topk_tokens < 0, 0).sum(dim=1)
    torch.testing.assert_close(mass, torch.ones_like(mass))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_leaves_rows_out(impl: str, device: str) -> None:
    hidden, weight, tokens = _inputs(40, device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=device)
    whole = kk.linear_logprobs(hidden, weight, tokens, topk=3, impl=impl)
    hidden = hidden.masked_fill(mask[:, None] == 0, math.nan)
    out = kk.linear_logprobs(hidden, weight, tokens, topk=3, mask=mask, entropy=True, impl=impl)
    assert torch.equal(out.topk_tokens[mask == 1], whole.topk_tokens[mask == 1])
    assert (out.topk_tokens[mask == 0] == -1).all()
    assert (out.topk_logprobs[mask == 0] == 0).all()
    assert (out.entropy[mask == 1] > 0).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_kept_logits_and_chunks_do_not_matter(impl: str, cache_bytes: int, device: str) -> None:
    options = {"topk": 4, "impl": impl, "softcap": 9.0, "entropy": True}
    once = _solve(60, F32, device, **options)
    again = _solve(60, F32, device, **options, workspace_bytes=4000, cache_bytes=cache_bytes)
    for name, value in once.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_batches(impl: str, device: str) -> None:
    hidden, weight, tokens = _inputs(40, device)
    flat = kk.linear_logprobs(hidden, weight, tokens, topk=3, impl=impl)
    out = kk.linear_logprobs(hidden.view(2, 3, H), weight, tokens.view(2, 3), topk=3, impl=impl)
    assert torch.equal(out.topk_tokens, flat.topk_tokens.view(2, 3, 3))
    assert torch.equal(out.topk_logprobs, flat.topk_logprobs.view(2, 3, 3))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_students_support(impl: str, device: str) -> None:
    """The K tokens may be the student's: ask the teacher at these, then distil."""
    hidden, weight, tokens = _inputs(80, device)
    teacher = (hidden + 1) @ weight.T * 0.7
    hidden.requires_grad_()
    with torch.no_grad():
        ids = kk.linear_logprobs(hidden, weight, tokens, topk=10, impl=impl).topk_tokens
    out = kk.kdrl_loss(
        hidden,
        weight,
        tokens,
        advantages=None,
        teacher_topk=(ids, teacher.log_softmax(1).gather(1, ids)),
        objective=kk.Objective(policy="off", kd="topk_rkl", kd_coef=1.0),
        impl=impl,
    )
    logp, logq = (hidden @ weight.T).log_softmax(1), teacher.log_softmax(1)
    exact = (logp.exp() * (logp - logq)).sum(1)
    assert (out.kl <= exact).all()
    assert (out.kl > 0.8 * exact).all()


def test_nothing_waits_for_the_device() -> None:
    """Meta tensors have no values: whatever reads one raises."""
    hidden, weight, tokens = (x.to("meta") for x in _inputs(1000))
    for cache_bytes in (0, 1 << 20):
        options = {"topk": 4, "rest": True, "cache_bytes": cache_bytes, "impl": "torch"}
        out = kk.linear_logprobs(hidden.requires_grad_(), weight, tokens, **options)
        (out.topk_logprobs.sum() + out.rest_logprob.sum()).backward()
        assert out.topk_tokens.dtype == torch.int64
        assert out.topk_tokens.shape == out.topk_logprobs.shape == (N, 4)
    assert hidden.grad.is_meta


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none_of_them": ({"topk": 0}, ValueError, r"topk must be in \[1, 40\] or None, got 0"),
    "too_many": ({"topk": 41}, ValueError, r"topk must be in \[1, 40\] or None, got 41"),
    "a_float": ({"topk": 2.0}, TypeError, "topk must be an integer or None, got 2.0"),
    "rest_is_no_flag": ({"topk": 2, "rest": "no"}, TypeError, "rest must be .*, got 'no'"),
    "ids_too": (
        {"topk": 2, "extra_tokens": torch.zeros(N, 1, dtype=torch.int64)},
        ValueError,
        "extra_tokens must be None with topk=2, got both",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kk.linear_logprobs(*_inputs(40), **options)


def test_a_compiled_caller_is_one_graph() -> None:
    """Whose fake outputs have the shapes and dtypes of the real ones."""
    torch.compiler.reset()

    def caller(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        out = kk.linear_logprobs(hidden, weight, tokens, topk=3, rest=True)
        return out.topk_logprobs.square().sum() + out.rest_logprob.sum(), out.topk_tokens

    gradients = []
    for function in (caller, torch.compile(caller, fullgraph=True, backend="aot_eager")):
        hidden, weight, tokens = _inputs(40)
        loss, ids = function(hidden.requires_grad_(), weight, tokens)
        gradients.append((torch.autograd.grad(loss, hidden)[0], ids))
    (ours, ids), (compiled, compiled_ids) = gradients
    assert torch.equal(ours, compiled)
    assert torch.equal(ids, compiled_ids)
