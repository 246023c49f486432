"""A sampled token of probability 0 has the ratio 1 on-policy, and a finite loss where it can."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import IMPLS, quick_or_slow
from tests.tolerance import relative_error

IMPOSSIBLE = 2
TOKENS = torch.tensor([IMPOSSIBLE, 0, IMPOSSIBLE, 1])
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, 3.0])
BASELINE = {"kd": "k2", "kd_baseline": "kl"}


def _solve(
    impl: str,
    device: str,
    bias: float,
    term: dict[str, Any],
    dtype: Any = torch.float32,
    **rows: Any,
) -> tuple[kk.LossOutput, dict[str, Tensor]]:
    """Run kdrl_loss on random heads whose logit of IMPOSSIBLE is moved by bias."""
    rng = torch.Generator().manual_seed(0)
    sizes = {"hidden": (4, 3), "weight": (5, 3), "t_hidden": (4, 2), "t_weight": (5, 2)}
    x = {k: torch.randn(*s, generator=rng).to(device, dtype) for k, s in sizes.items()}
    student = {k: x[k].requires_grad_() for k in ("hidden", "weight")}
    moved = torch.zeros(5, device=device, dtype=dtype)
    moved[IMPOSSIBLE] = bias
    teacher_bias = rows.pop("teacher_bias", moved)
    teacher = kk.TeacherHead(x["t_hidden"], x["t_weight"], teacher_bias) if term["kd"] else None
    rows = {k: v.to(device) for k, v in rows.items()}
    result = kk.kdrl_loss(
        tokens=TOKENS.to(device),
        bias=moved,
        advantages=ADVANTAGES.to(device),
        teacher=teacher,
        objective=kk.Objective(kd_coef=0.5, entropy_coef=0.1, **term),
        impl=impl,
        **student,
        **rows,
    )
    result.loss.backward()
    return result, {k: v.grad for k, v in student.items()}


@pytest.mark.parametrize("old", [None, -torch.inf], ids=["on_policy", "same_old"])
@pytest.mark.parametrize(
    ("impl", "kd"), quick_or_slow(IMPLS, [None, "rkl", "fkl", "jsd"], {"rkl", "fkl", "jsd"})
)
def test_it_is_like_one_of_almost_no_probability(
    impl: str, kd: str | None, old: float | None, device: str
) -> None:
    """At a logit of -1e4 its probability is exactly 0 in float64 too, and nothing is infinite."""
    rows = {}
    if old is not None:  # that of the other rows is finite
        rows["old_logprobs"] = torch.where(TOKENS == IMPOSSIBLE, old, -1.0)
    result, grads = _solve(impl, device, -torch.inf, {"kd": kd}, **rows)
    if old is not None:
        exact = _solve("reference", device, -1e4, {"kd": kd}, torch.float64)[0].logprobs
        rows["old_logprobs"] = torch.where(TOKENS == IMPOSSIBLE, exact.cpu(), -1.0)
    exact, exact_grads = _solve("reference", device, -1e4, {"kd": kd}, torch.float64, **rows)
    assert result.logprobs[[0, 2]].tolist() == [-torch.inf] * 2
    assert relative_error(result.loss, exact.loss) < 1e-6
    for name, gradient in grads.items():
        assert relative_error(gradient, exact_grads[name]) < 1e-6, name
    for name in ("ratio_sum", "ratio_max", "clipped", "entropy_sum"):
        assert relative_error(result.metrics[name], exact.metrics[name]) < 1e-6, name


@pytest.mark.parametrize(
    ("impl", "kind"), quick_or_slow(IMPLS, ["k2", "k3", "baseline"], {"k2", "baseline"})
)
def test_a_token_that_both_models_exclude_has_no_sampled_kd(
    impl: str, kind: str, device: str
) -> None:
    """log p - log q counts 0 there: these rows are as without a teacher."""
    term = BASELINE if kind == "baseline" else {"kd": kind}
    kd_weight = (TOKENS == IMPOSSIBLE).float()
    result, grads = _solve(impl, device, -torch.inf, term, kd_weight=kd_weight)
    plain, plain_grads = _solve(impl, device, -torch.inf, {"kd": None})
    assert torch.equal(result.loss, plain.loss)
    assert all(torch.equal(grads[name], plain_grads[name]) for name in grads)
    assert result.metrics["teacher_log_ratio_sum"] == 0


@pytest.mark.parametrize("term", [{"kd": "k2"}, {"kd": "k3"}, {"kd": "fkl"}, BASELINE], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_teacher_that_allows_it_makes_these_terms_infinite(
    impl: str, term: dict[str, Any], device: str
) -> None:
    result, grads = _solve(impl, device, -torch.inf, term, teacher_bias=None)
    assert result.loss == torch.inf
    finite = term["kd"] in ("k3", "fkl")
    assert all(gradient.isfinite().all() == finite for gradient in grads.values())


@pytest.mark.parametrize("kd", ["rkl", "jsd"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_teacher_that_allows_it_leaves_these_finite(impl: str, kd: str, device: str) -> None:
    result, grads = _solve(impl, device, -torch.inf, {"kd": kd}, teacher_bias=None)
    exact, exact_grads = _solve(
        "reference", device, -1e4, {"kd": kd}, torch.float64, teacher_bias=None
    )
    assert relative_error(result.loss, exact.loss) < 1e-6
    for name, gradient in grads.items():
        assert relative_error(gradient, exact_grads[name]) < 1e-6, name


@pytest.mark.parametrize("impl", IMPLS)
def test_jsd_is_finite_where_each_model_excludes_a_token_of_the_other(
    impl: str, device: str
) -> None:
    results = []
    for name, dtype, low in ((impl, torch.float32, -torch.inf), ("reference", torch.float64, -1e4)):
        teacher_bias = torch.tensor([0, low, 0, 0, 0], dtype=dtype, device=device)
        results.append(_solve(name, device, low, {"kd": "jsd"}, dtype, teacher_bias=teacher_bias))
    (ours, grads), (exact, exact_grads) = results
    assert relative_error(ours.kl, exact.kl) < 1e-6
    assert relative_error(ours.loss, exact.loss) < 1e-6
    for name, gradient in grads.items():
        assert relative_error(gradient, exact_grads[name]) < 1e-6, name


@pytest.mark.parametrize("impl", IMPLS)
def test_a_softcap_makes_a_forbidden_token_finite(impl: str, device: str) -> None:
    """Its logit is -softcap, where the softcap is flat: it has no gradient of its own."""
    hidden = torch.tensor([[0.0, 1.0, 2.0]], device=device, requires_grad=True)
    bias = torch.tensor([0, 0, -torch.inf], device=device)
    tokens = torch.tensor([2], device=device)
    eye = torch.eye(3, device=device)
    out = kk.linear_logprobs(hidden, eye, tokens, bias=bias, softcap=5.0, impl=impl)
    out.logprobs.sum().backward()
    capped = torch.tensor([0, 5 * math.tanh(1 / 5), -5])
    p = capped.softmax(0)
    slope = 1 - math.tanh(1 / 5) ** 2
    assert relative_error(out.logprobs.cpu(), p[2:].log()) < 1e-6
    expected = torch.tensor([[-p[0], -p[1] * slope, 0]])
    assert relative_error(hidden.grad.cpu(), expected) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_of_nan_is_not_taken_for_one(impl: str, device: str) -> None:
    hidden = torch.tensor([[torch.nan, 1.0]], device=device, requires_grad=True)
    result = kk.kdrl_loss(
        hidden,
        torch.eye(2, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        advantages=torch.ones(1, device=device),
        objective=kk.Objective(kd=None),
        impl=impl,
    )
    assert result.loss.isnan()
