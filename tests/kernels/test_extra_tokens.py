"""Log-probabilities at K ids, and that of the rest, match full logits in value and gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import F16, F32, F64, IMPL_DTYPES, IMPLS
from tests.kernels.problem import make_problem
from tests.tolerance import assert_matches, relative_error

N, V = 7, 37
IDS = torch.tensor(
    [
        [3, 36, 0, -1],
        [5, 5, -1, 5],  # repeated
        [-1, -1, -1, -1],
        [8, 1, 2, 30],
        [-1, 7, 7, 9],
        [0, 1, 2, 3],
        [20, 20, 20, 20],
    ]
)
LOG_0 = pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")
"""Triton's interpreter warns of the logarithm of 0, which is that of no rest."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.6},
    "temperature_of_each_row": {"temperature": torch.linspace(0.5, 1.5, N)},
    "top_p": {"truncation": kk.Truncation(top_p=0.9)},
}


def _loss(rows: kk.Rows, inputs: dict[str, Tensor]) -> Tensor:
    """Return a loss that reads all there is of a row, with weights of both signs."""
    n = rows.index
    extra = torch.where(rows.extra_logprobs.isfinite(), rows.extra_logprobs, 0)
    loss = inputs["c"][n] * rows.logprobs + (inputs["ids"][n] * extra).sum(dim=1)
    loss = loss + (inputs["ids"][n] * extra.exp()).square().sum(dim=1)
    if rows.rest_logprob is not None:
        rest = torch.where(rows.rest_logprob.isfinite(), rows.rest_logprob, 0)
        loss = loss + inputs["r"][n] * rest
    if rows.entropy is not None:
        loss = loss + inputs["e"][n] * rows.entropy
    for kl in (rows.kl, rows.forward_kl):
        loss = loss if kl is None else loss + inputs["g"][n] * kl
    return loss


def _solve(
    impl: str,
    dtype: torch.dtype,
    cast: Any,
    device: str,
    *,
    ids: Tensor = IDS,
    kl: str | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Return outputs and gradients of linear_token_loss."""
    kind = {"kd": kl} if kl in ("rkl", "fkl", "jsd") else {"kd": "rkl" if kl else None}
    problem = make_problem(N, dtype=dtype, device=device, **kind).map(cast)
    problem.tokens[0], problem.tokens[4] = 3, 7  # y is among the ids
    rng = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(N, generator=rng) for name in ("c", "r", "e", "g")}
    inputs["ids"] = torch.randn(N, ids.shape[1], generator=rng)
    inputs = {k: v.to(device).to(problem.student["hidden"].dtype) for k, v in inputs.items()}
    student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
    teacher = problem.teacher and kk.TeacherHead(**problem.teacher)
    out = kk.linear_token_loss(
        tokens=problem.tokens,
        loss_fn=lambda rows: _loss(rows, inputs),
        extra_tokens=ids.to(device),
        teacher=teacher,
        kl=kl,
        token_weights=problem.options["token_weights"],
        impl=impl,
        **student,
        **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()},
    )
    out.loss.backward()
    names = ("logprobs", "extra_logprobs", "rest_logprob", "entropy", "kl")
    results = {name: getattr(out, name) for name in names if getattr(out, name) is not None}
    return results | {f"d{name}": value.grad for name, value in student.items()}


def _assert_matches(impl: str, dtype: torch.dtype, device: str, **options: Any) -> None:
    ours = _solve(impl, dtype, lambda x: x, device, **options)

    def reference(cast: torch.dtype) -> dict[str, Tensor]:
        return _solve("reference", dtype, lambda x: x.to(cast), device, **options)

    assert_matches(ours, reference)


@pytest.mark.parametrize("rest", [False, True], ids=["ids", "rest"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
def test_matches_definition(
    impl: str, dtype: torch.dtype, options: dict[str, Any], rest: bool, device: str
) -> None:
    _assert_matches(impl, dtype, device, rest=rest, **options)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("kl", ["rkl", "fkl", "jsd", "rkl+fkl"])
@pytest.mark.parametrize(("impl", "rest"), [("torch", False), ("torch", True), ("triton", True)])
def test_beside_an_exact_divergence_and_entropy(
    impl: str, kl: str, rest: bool, softcap: float | None, device: str
) -> None:
    _assert_matches(impl, F32, device, kl=kl, rest=rest, entropy=True, softcap=softcap)


@LOG_0
@pytest.mark.parametrize("K", [1, 512])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_few_and_many_ids(impl: str, K: int, device: str) -> None:
    """K may be larger than the vocabulary: then most ids are there many times."""
    ids = torch.randint(-1, V, (N, K), generator=torch.Generator().manual_seed(2))
    ids[0] = 5
    _assert_matches(impl, F32, device, ids=ids, rest=True)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_chunks_change_rounding_alone(impl: str, device: str) -> None:
    options: dict[str, Any] = {"rest": True, "kl": "rkl", "entropy": True}
    one = _solve(impl, F32, lambda x: x, device, **options)
    three = _solve(impl, F32, lambda x: x, device, workspace_bytes=6000, **options)
    torch.testing.assert_close(one, three)


@pytest.mark.parametrize("cached", [0, 3, N], ids="cached{}".format)
@pytest.mark.parametrize("name", ["extra_logprobs", "rest_logprob", "both"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_linear_logprobs(impl: str, name: str, cached: int, device: str) -> None:
    """Each output alone has its gradient, and both have theirs, by logits kept or not."""

    def solve(impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
        problem = make_problem(N, kd=None, device=device, dtype=dtype)
        student = {k: v.requires_grad_() for k, v in problem.student.items()}
        out = kk.linear_logprobs(
            tokens=problem.tokens,
            extra_tokens=IDS.to(device),
            rest=True,
            workspace_bytes=3 * 1500,
            cache_bytes=0 if impl == "reference" else cached * 64 * 4,
            impl=impl,
            **student,
        )
        extra, rest = out.extra_logprobs, out.rest_logprob
        assert extra is not None
        assert rest is not None
        weights = torch.randn(N, 5, generator=torch.Generator().manual_seed(3)).to(extra)
        losses = {"extra_logprobs": weights[:, :4] * extra, "rest_logprob": weights[:, 4] * rest}
        sum(losses[key].sum() for key in losses if name in (key, "both")).backward()
        results = {"extra_logprobs": extra.detach(), "rest_logprob": rest.detach()}
        return results | {f"d{k}": v.grad for k, v in student.items()}

    assert_matches(
        solve(impl, F32),
        lambda dtype: solve("reference", dtype),
        lambda _: {"rest_logprob": 1.0},  # near r = 1 it is the difference of two logarithms
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_rest_of_1e_12_has_digits(impl: str, device: str) -> None:
    """1 - (sum of p) would be 0 in float32."""

    def solve(impl: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        problem = make_problem(N, kd=None, device=device, dtype=dtype)
        problem.student["bias"][:3] += 35
        student = {k: v.requires_grad_() for k, v in problem.student.items()}
        out = kk.linear_logprobs(
            tokens=problem.tokens,
            extra_tokens=torch.tensor([[2, 0, 1, 1]] * N, device=device),
            rest=True,
            impl=impl,
            **student,
        )
        assert out.rest_logprob is not None
        out.rest_logprob.sum().backward()
        return out.rest_logprob.detach(), {k: v.grad for k, v in student.items()}

    (ours, gradients), (exact, expected) = solve(impl, F32), solve("reference", F64)
    assert exact.exp().max() < 2e-12
    assert relative_error(ours, exact) < 2e-7
    for name, gradient in gradients.items():  # logits of 40 have an error of 2e-6
        assert relative_error(gradient, expected[name]) < 1e-5, name
    columns = expected["bias"]
    assert ((gradients["bias"] - columns).abs() <= 1e-5 * columns.abs() + 1e-12).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_id_of_probability_0_is_a_constant(impl: str, device: str) -> None:
    """One that a bias forbids gives -inf and no gradient, whatever the loss makes of it."""
    problem = make_problem(N, kd=None, device=device)
    problem.student["bias"][[4, 9]] = -torch.inf
    problem.tokens[:] = 1
    outputs = []
    for ids in ([4, 9, 3], [3, -1, -1]):
        student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
        out = kk.linear_logprobs(
            tokens=problem.tokens,
            extra_tokens=torch.tensor([ids] * N, device=device),
            rest=True,
            impl=impl,
            **student,
        )
        assert out.extra_logprobs is not None
        assert out.rest_logprob is not None
        (out.extra_logprobs.exp() * out.extra_logprobs).nansum().backward(retain_graph=True)
        (out.rest_logprob.sum() + 2 * out.extra_logprobs.sum()).backward()
        outputs.append((out, student))
    (out, student), (without, student_without) = outputs
    assert (out.extra_logprobs[:, :2] == -torch.inf).all()
    torch.testing.assert_close(out.rest_logprob, without.rest_logprob)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(student[name].grad, student_without[name].grad)


@LOG_0
@pytest.mark.parametrize("impl", IMPLS)
def test_a_rest_of_nothing_is_a_constant(impl: str, device: str) -> None:
    """Where the ids are the whole vocabulary: -inf; where there is none: 0."""
    problem = make_problem(2, kd=None, device=device)
    hidden = problem.student["hidden"].requires_grad_()
    ids = torch.stack([torch.arange(V), torch.full((V,), -1)]).to(device)
    weight, bias = problem.student["weight"], problem.student["bias"]
    out = kk.linear_logprobs(
        hidden, weight, problem.tokens, bias=bias, extra_tokens=ids, rest=True, impl=impl
    )
    assert out.rest_logprob is not None
    assert out.extra_logprobs is not None
    assert out.rest_logprob.tolist() == [-torch.inf, 0]
    assert (out.extra_logprobs[1] == 0).all()
    torch.testing.assert_close(out.extra_logprobs[0].exp().sum().item(), 1.0)
    out.rest_logprob.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_without_a_gradient_are_left_out(impl: str, dtype: torch.dtype, device: str) -> None:
    """Rows whose only coefficients are those of an id and the rest are used, no others."""
    used = torch.tensor([False, True, False, False, True, True, False], device=device)
    results = []
    for compact in (False, True):
        problem = make_problem(N, kd=None, device=device, dtype=dtype)
        student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
        out = kk.linear_token_loss(
            tokens=problem.tokens,
            loss_fn=lambda rows: torch.where(
                used[rows.index], rows.extra_logprobs[:, 0] + rows.rest_logprob, 0
            ),
            extra_tokens=IDS.abs().to(device),
            rest=True,
            compact=compact,
            impl=impl,
            **student,
        )
        out.loss.backward()
        results.append({k: v.grad for k, v in student.items()})
        assert out.metrics["gradient_rows"] == (3 if compact else N)
    whole, compacted = results
    assert torch.equal(whole["hidden"].ne(0).any(dim=1), used)
    torch.testing.assert_close(whole, compacted)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_weight_0_may_hold_any_id(impl: str, device: str) -> None:
    problem = make_problem(N, kd=None, device=device)
    ids = IDS.to(device).clone()
    ids[1] = 10_000
    problem.options["token_weights"][1] = 0
    out = kk.kdrl_loss(
        tokens=problem.tokens, extra_tokens=ids, impl=impl, **problem.student, **problem.options
    )
    assert out.extra_logprobs is not None
    assert not out.extra_logprobs.requires_grad
    scores = kk.linear_logprobs(
        tokens=problem.tokens,
        extra_tokens=ids,
        mask=problem.options["token_weights"],
        impl=impl,
        **problem.student,
    )
    assert scores.extra_logprobs is not None
    for values in (out.extra_logprobs, scores.extra_logprobs):
        assert values[1].tolist() == [0] * 4
        assert values[2].tolist() == [0] * 4
        assert (values[[0, 3, 5, 6]][:, 1] < 0).all()
    torch.testing.assert_close(out.extra_logprobs, scores.extra_logprobs)


@pytest.mark.parametrize("impl", IMPLS)
def test_batches(impl: str, device: str) -> None:
    """[B, T, K] ids give what their N = B · T rows give."""
    problem = make_problem(6, kd=None, device=device)
    ids = IDS[:6].to(device)
    hidden, weight = problem.student["hidden"], problem.student["weight"]
    options: dict[str, Any] = {"rest": True, "impl": impl}
    flat = kk.linear_logprobs(hidden, weight, problem.tokens, extra_tokens=ids, **options)
    batch = kk.linear_logprobs(
        hidden.view(2, 3, -1),
        weight,
        problem.tokens.view(2, 3),
        extra_tokens=ids.view(2, 3, 4),
        **options,
    )
    assert torch.equal(batch.extra_logprobs, flat.extra_logprobs.view(2, 3, 4))
    assert torch.equal(batch.rest_logprob, flat.rest_logprob.view(2, 3))
    with pytest.raises(ValueError, match=r"extra_tokens must be \[B, T, K\] with B = 2 and T = 3"):
        kk.linear_logprobs(
            hidden.view(2, 3, -1), weight, problem.tokens.view(2, 3), extra_tokens=ids, **options
        )


@pytest.mark.parametrize("kl", [None, "rkl", "fkl", "jsd", "rkl+fkl"])
def test_float64_matches_to_1e_12(kl: str | None, device: str) -> None:
    options: dict[str, Any] = {"kl": kl, "rest": True, "entropy": True, "softcap": 3.0}
    ours = _solve("torch", F64, lambda x: x, device, **options)
    exact = _solve("reference", F64, lambda x: x, device, **options)
    for name, value in exact.items():
        assert relative_error(ours[name], value) < 1e-12, name


def test_the_definition_has_its_own_gradient() -> None:
    problem = make_problem(N, kd=None, dtype=F64)
    hidden, weight = problem.student["hidden"].requires_grad_(), problem.student["weight"]

    def outputs(hidden: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"extra_tokens": IDS, "rest": True, "impl": impl}
        out = kk.linear_logprobs(hidden, weight, problem.tokens, **options)
        assert out.extra_logprobs is not None
        assert out.rest_logprob is not None
        return out.extra_logprobs, out.rest_logprob

    for impl in ("reference", "torch"):
        assert torch.autograd.gradcheck(lambda x, impl=impl: outputs(x, impl), hidden)


@pytest.mark.parametrize("kl", [None, "rkl"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_other_outputs_keep_their_bits(impl: str, kl: str | None, device: str) -> None:
    """So a ratio is exactly 1 on-policy, whether or not one of the two calls has ids."""
    problem = make_problem(N, kd=kl, device=device)
    plain = problem.solve(impl=impl, entropy=True)
    with_ids = problem.solve(impl=impl, entropy=True, extra_tokens=IDS.to(device))
    for name, value in plain.items():
        assert torch.equal(with_ids[name], value), name
    options: dict[str, Any] = {"impl": impl, "tokens": problem.tokens, **problem.student}
    scores = kk.linear_logprobs(extra_tokens=IDS.to(device), rest=True, **options)
    assert torch.equal(scores.logprobs, plain["logprobs"])
