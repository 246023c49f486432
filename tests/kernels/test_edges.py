"""Rows and logits at the edge are computed right: none, one, masked, NaN, infinite, huge."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import IMPLS, quick_or_slow
from tests.kernels.problem import make_problem
from tests.tolerance import relative_error


def _run(impl: str, student: dict[str, Tensor], tokens: Tensor, **options: Any) -> Any:
    student = {k: v.detach().clone().requires_grad_() for k, v in student.items()}
    result = kk.kdrl_loss(tokens=tokens, impl=impl, **student, **options)
    result.loss.backward()
    return result, {k: v.grad for k, v in student.items()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kd", ["k2", "rkl"])
def test_no_rows(kd: str, impl: str, device: str) -> None:
    problem = make_problem(0, kd=kd, device=device)
    teacher = kk.TeacherHead(**problem.teacher)
    result, grads = _run(impl, problem.student, problem.tokens, teacher=teacher, **problem.options)
    assert result.loss == 0
    assert result.logprobs.shape == (0,)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())
    assert kk.linear_logprobs(
        tokens=problem.tokens, impl=impl, **problem.student
    ).logprobs.shape == (0,)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kd", ["k2", "rkl"])
def test_masked_rows_may_hold_nan_and_bad_tokens(kd: str, impl: str, device: str) -> None:
    problem = make_problem(6, kd=kd, device=device)
    kept = torch.tensor([True, False, True, True, False, True], device=device)
    weights = problem.options["token_weights"] * kept
    expected = _masked(problem, kept, impl)

    def poison(x: Tensor) -> Tensor:
        return torch.where(kept.view(-1, *[1] * (x.ndim - 1)), x, torch.nan)

    student = problem.student | {"hidden": poison(problem.student["hidden"])}
    teacher = kk.TeacherHead(poison(problem.teacher["hidden"]), problem.teacher["weight"])
    names = ("advantages", "old_logprobs", "kd_weight")
    options = problem.options | {k: poison(problem.options[k]) for k in names}
    options |= {"token_weights": weights, "teacher": teacher}
    tokens = torch.where(kept, problem.tokens, -100)
    result, grads = _run(impl, student, tokens, **options)
    torch.testing.assert_close(result.loss, expected[0].loss)
    assert torch.equal(result.logprobs[kept], expected[0].logprobs)
    assert torch.equal(result.logprobs[~kept], torch.zeros(2, device=device))
    assert torch.equal(grads["hidden"][~kept], torch.zeros(2, 16, device=device))
    torch.testing.assert_close(grads["hidden"][kept], expected[1]["hidden"])
    torch.testing.assert_close(grads["weight"], expected[1]["weight"])
    assert result.metrics["tokens"] == 4


def _masked(problem: Any, kept: Tensor, impl: str) -> Any:
    """Compare with a call from which the masked rows are left out by hand."""
    student = problem.student | {"hidden": problem.student["hidden"][kept]}
    options = {k: v[kept] if isinstance(v, Tensor) else v for k, v in problem.options.items()}
    teacher = kk.TeacherHead(problem.teacher["hidden"][kept], problem.teacher["weight"])
    return _run(impl, student, problem.tokens[kept], teacher=teacher, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_row_masked(impl: str, device: str) -> None:
    problem = make_problem(kd="rkl", device=device)
    options = problem.options | {"token_weights": torch.zeros(7, device=device)}
    student = problem.student | {"hidden": torch.full((7, 16), torch.nan, device=device)}
    teacher = kk.TeacherHead(**problem.teacher)
    result, grads = _run(impl, student, problem.tokens, teacher=teacher, **options)
    assert result.loss == 0
    assert torch.equal(result.kl, torch.zeros(7, device=device))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())


def _exact_and_ours(
    impl: str, device: str, kd: str, student_logits: Tensor, teacher_logits: Tensor
) -> list[tuple[Any, dict[str, Tensor]]]:
    """Run kdrl_loss with hidden = logits, weight = identity: float64 reference, then impl."""
    N, V = student_logits.shape
    results = []
    for name, dtype in (("reference", torch.float64), (impl, torch.float32)):
        eye = torch.eye(V, dtype=dtype, device=device)
        bias = student_logits[0].to(device, dtype) * 0
        student = {"hidden": student_logits.to(device, dtype), "weight": eye, "bias": bias}
        # infinities would meet zeros in the GEMM: they come by the bias
        if student_logits.isinf().any():
            student["bias"] = torch.where(student_logits[0].isinf(), -torch.inf, 0.0).to(bias)
            student["hidden"] = student_logits.clamp_min(0).to(device, dtype)
        t_bias = torch.where(teacher_logits[0].isinf(), -torch.inf, 0.0).to(bias)
        t_hidden = torch.where(teacher_logits.isinf(), 0, teacher_logits).to(device, dtype)
        teacher = kk.TeacherHead(t_hidden, eye, t_bias)
        options = {"objective": kk.Objective(kd=kd, kd_coef=0.5), "entropy": True}
        advantages = torch.linspace(-1, 1, N, device=device)
        tokens = torch.arange(N, device=device) % V
        results.append(
            _run(name, student, tokens, teacher=teacher, advantages=advantages, **options)
        )
    return results


def _assert_close(ours: Any, exact: Any, grads: Any, exact_grads: Any) -> None:
    """Assert equality to float32 rounding; the parts of a loss may cancel."""
    for name in ("logprobs", "teacher_logprobs", "entropy"):
        assert relative_error(getattr(ours, name), getattr(exact, name)) < 1e-6, name
    assert relative_error(ours.loss, exact.loss) < 1e-5
    assert relative_error(grads["hidden"], exact_grads["hidden"]) < 1e-6


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kd", ["k2", "rkl", "fkl", "jsd", "rkl+fkl"])
def test_one_hot_teacher(kd: str, impl: str, device: str) -> None:
    torch.manual_seed(0)
    teacher = torch.zeros(4, 9)
    teacher[torch.arange(4), torch.tensor([0, 1, 5, 8])] = 1e4
    (exact, exact_grads), (ours, grads) = _exact_and_ours(
        impl, device, kd, torch.randn(4, 9), teacher
    )
    _assert_close(ours, exact, grads, exact_grads)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kd", ["k2", "rkl", "fkl", "jsd", "rkl+fkl"])
def test_huge_logits(kd: str, impl: str, device: str) -> None:
    torch.manual_seed(0)
    student = torch.randn(6, 33) + torch.tensor([1e4, -1e4, 0, 1e4, -1e4, 0])[:, None]
    student[2, 3], student[5, 5] = 1e4, -1e4
    teacher = torch.randn(6, 33) - torch.tensor([1e4, -1e4, 0, -1e4, 1e4, 0])[:, None]
    # float32 logits near 1e4 are 1e-3 apart: give both the same ones
    student, teacher = student.round(decimals=1).float(), teacher.round(decimals=1).float()
    (exact, exact_grads), (ours, grads) = _exact_and_ours(impl, device, kd, student, teacher)
    _assert_close(ours, exact, grads, exact_grads)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kd", ["k2", "rkl", "fkl", "jsd", "rkl+fkl"])
def test_columns_that_are_minus_infinity_in_both(kd: str, impl: str, device: str) -> None:
    torch.manual_seed(0)
    student, teacher = torch.rand(4, 9), torch.rand(4, 9)
    student[:, 6:] = teacher[:, 6:] = -torch.inf
    (exact, exact_grads), (ours, grads) = _exact_and_ours(impl, device, kd, student, teacher)
    _assert_close(ours, exact, grads, exact_grads)
    assert torch.equal(grads["hidden"][:, 6:], torch.zeros(4, 3, device=device))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_teacher_that_excludes_what_the_student_does_not(impl: str, device: str) -> None:
    """KL(p‖q) is infinite and stays so; KL(q‖p) is finite; a row of KD weight 0 stays finite."""
    torch.manual_seed(0)
    hidden, eye = torch.rand(2, 4, device=device), torch.eye(4, device=device)
    bias = torch.tensor([0, 0, 0, -torch.inf], device=device)
    teacher = kk.TeacherHead(torch.rand(2, 4, device=device), eye, bias)
    tokens = torch.zeros(2, dtype=torch.int64, device=device)
    options = {"teacher": teacher, "advantages": torch.ones(2, device=device)}
    student = {"hidden": hidden, "weight": eye}
    rkl, fkl = kk.Objective(kd="rkl"), kk.Objective(kd="fkl")
    result, _ = _run(impl, student, tokens, objective=rkl, **options)
    assert result.kl.tolist() == [torch.inf, torch.inf]
    assert result.loss == torch.inf
    result, grads = _run(impl, student, tokens, objective=fkl, **options)
    assert result.kl.isfinite().all()
    assert grads["hidden"].isfinite().all()
    off = torch.zeros(2, device=device)
    plain, plain_grads = _run(
        impl, student, tokens, objective=kk.Objective(kd=None), advantages=options["advantages"]
    )
    for objective in (rkl, kk.Objective(kd_baseline="kl")):
        result, grads = _run(impl, student, tokens, objective=objective, kd_weight=off, **options)
        assert torch.equal(result.loss, plain.loss)
        assert torch.equal(grads["hidden"], plain_grads["hidden"])


@pytest.mark.parametrize("impl", IMPLS)
def test_far_off_policy_rows_overflow_nothing_that_is_clipped(impl: str, device: str) -> None:
    """At lp - old = ±1e4, clipped, dual-clipped and zero-advantage rows have finite gradients."""
    hidden = torch.tensor([[1e4, 0.0]] * 3 + [[-1e4, 0.0]], device=device)
    old = torch.tensor([-1e4, -1e4, -1e4, 0.0], device=device)
    advantages = torch.tensor([1.0, -1.0, 0.0, -1.0], device=device)
    tokens = torch.zeros(4, dtype=torch.int64, device=device)
    objective = kk.Objective(kd=None, dual_clip=3.0)
    student = {"hidden": hidden, "weight": torch.eye(2, device=device)}
    result, grads = _run(
        impl, student, tokens, objective=objective, old_logprobs=old, advantages=advantages
    )
    # -(1.2·1) + 3·1 + 0 + 0.8·1 over 4 rows
    torch.testing.assert_close(result.loss, torch.tensor(2.6 / 4, device=device))
    assert torch.equal(grads["hidden"], torch.zeros(4, 2, device=device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("policy", ["clip", "none"])
def test_a_zero_advantage_times_an_infinite_ratio_is_zero(
    policy: str, impl: str, device: str
) -> None:
    student = {"hidden": torch.zeros(1, 2, device=device), "weight": torch.eye(2, device=device)}
    result, grads = _run(
        impl,
        student,
        torch.zeros(1, dtype=torch.int64, device=device),
        advantages=torch.zeros(1, device=device),
        old_logprobs=torch.full((1,), -1e4, device=device),
        objective=kk.Objective(policy=policy, kd=None),
    )
    assert result.loss == 0
    assert torch.equal(grads["hidden"], torch.zeros(1, 2, device=device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["advantages", "old_logprobs", "token_weights", "kd_weight"])
def test_a_nan_input_makes_the_loss_nan(name: str, impl: str, device: str) -> None:
    problem = make_problem(device=device)
    value = problem.options[name].clone()
    value[3] = torch.nan
    teacher = kk.TeacherHead(**problem.teacher)
    options = problem.options | {name: value, "teacher": teacher}
    result, _ = _run(impl, problem.student, problem.tokens, **options)
    assert result.loss.isnan()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("temperature", [0.1, 0.2])
def test_a_softcap_where_the_sampled_token_has_no_probability_left(
    impl: str, temperature: float, device: str
) -> None:
    """p of the token is 0 in float32, but its logit still has a gradient, and a slope."""
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[25.0, 1], [-15, 2], [0, 3]])
    results = []
    for name, dtype in ((impl, torch.float32), ("reference", torch.float64)):
        inputs = [x.to(device, dtype).clone().requires_grad_() for x in (hidden, weight)]
        kk.kdrl_loss(
            *inputs,
            torch.tensor([1], device=device),
            advantages=torch.ones(1, device=device),
            objective=kk.Objective(kd=None),
            softcap=30.0,
            temperature=temperature,
            impl=name,
        ).loss.backward()
        results.append([x.grad.double() for x in inputs])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("impl", "kd"),
    quick_or_slow(["torch", "triton"], [None, "k2", "rkl", "fkl", "jsd"], {"k2", "fkl", "jsd"}),
)
@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e5])
def test_float16_gradients_of_any_size(kd: str | None, size: float, impl: str, device: str) -> None:
    """float16 cannot hold these coefficients; those of the first chunks are the smallest."""
    problem = make_problem(12, kd=kd, dtype=torch.float16, device=device, off_policy=False)
    sizes = torch.logspace(-3, 0, 12, device=device) * size
    options = {"advantages": sizes, "normalizer": size, "token_weights": None, "kd_weight": None}
    if kd:
        objective = kk.Objective(policy="off", kd=kd, kd_coef=size)
        options |= {"objective": objective, "advantages": None, "kd_weight": sizes / size}
    results = problem.solve(impl=impl, workspace_bytes=3 * 64 * 4 * 10, **options)
    exact = problem.map(torch.Tensor.double).solve(
        impl="reference", **{k: _double(v) for k, v in options.items()}
    )
    for name in ("dhidden", "dweight", "dbias"):
        assert relative_error(results[name], exact[name]) <= 2e-3, name


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("kd", ["k2", "k3", "rkl"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_ratio_cap_below_1_holds_on_policy_too(impl: str, kd: str, device: str) -> None:
    """s = min(r, cap) is cap where r = 1, with and without old log-probabilities."""
    results = []
    for options in ({"kd_coef": 0.5, "kd_ratio_cap": 0.25}, {"kd_coef": 0.125}):
        problem = make_problem(kd=kd, device=device, off_policy=False, objective=options)
        results.append(problem.solve(impl=impl))
        old = results[-1]["logprobs"]
        torch.testing.assert_close(problem.solve(impl=impl, old_logprobs=old), results[-1])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_infinite_ratio_cap_is_no_cap(impl: str, device: str) -> None:
    results = []
    for cap in (torch.inf, 1e9):
        problem = make_problem(device=device, objective={"kd_ratio_cap": cap})
        problem.options["old_logprobs"] -= 5  # ratios of e^5
        results.append(problem.solve(impl=impl))
    for name, expected in results[1].items():
        assert torch.equal(results[0][name], expected), name
