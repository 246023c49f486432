"""k3 stays finite where exp(-l) overflows, and equals what other libraries compute elsewhere."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import F32, F64, IMPLS
from tests.kernels.problem import assert_solves, make_problem
from tests.tolerance import relative_error

LOG_RATIOS = [-3e4, -100.0, -25.0, -19.9, -1.0, 0.5, 90.0]
"""l of each of the 7 rows: far beyond float32's exp, beyond the bound, inside it."""


def _problem(device: str, dtype: torch.dtype = F32, **options: Any) -> Any:
    """Return a problem of make_problem with a teacher whose l are LOG_RATIOS."""
    problem = make_problem(kd="k3", server=True, device=device, dtype=dtype, **options)
    student = kk.linear_logprobs(tokens=problem.tokens, **problem.student).logprobs
    log_ratios = torch.tensor(LOG_RATIOS, dtype=dtype, device=device)
    problem.options["teacher_logprobs"] = student - log_ratios
    return problem


def _tangent(lp: Tensor, lq: Tensor, bound: float) -> Tensor:
    """Write out k3 and its tangent at -l = bound, by the point and the slope there."""
    x = lq - lp
    inside = x.clamp(max=bound).exp() - 1 - x.clamp(max=bound)
    return torch.where(x > bound, inside + (math.exp(bound) - 1) * (x - bound), inside)


def _by_autograd(problem: Any, term: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """Solve in full logits for a term of lp and lq, weighted as kdrl_loss weights k3 alone."""
    student = {k: v.detach().double().requires_grad_() for k, v in problem.student.items()}
    logits = student["hidden"] @ student["weight"].T + student["bias"]
    lp = logits.log_softmax(dim=1).gather(1, problem.tokens[:, None]).squeeze(1)
    options = {k: v.double() for k, v in problem.options.items() if isinstance(v, Tensor)}
    weights = options["token_weights"] * options["kd_weight"] * 0.5
    loss = (weights * term(lp, options["teacher_logprobs"])).sum() / options["token_weights"].sum()
    loss.backward()
    return {"loss": loss.detach()} | {f"d{k}": v.grad for k, v in student.items()}


@pytest.mark.parametrize("bound", [0.5, 20.0, 60.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_tangent_beyond_the_bound(impl: str, bound: float, device: str) -> None:
    objective = {"policy": "off", "k3_bound": bound}
    problem = _problem(device, objective=objective, off_policy=False)
    ours = problem.solve(impl=impl)
    exact = _by_autograd(problem, lambda lp, lq: _tangent(lp, lq, bound))
    for name, value in exact.items():
        assert ours[name].isfinite().all()
        assert relative_error(ours[name], value) < 1e-5, name
    assert_solves(problem, ours)


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_by_hand(impl: str, device: str) -> None:
    """p = (1/4, 3/4), l = -30: k3 = e^20 (1 + 30 - 20) - 1 - 30, its derivative 1 - e^20."""
    logits = torch.tensor([[0.0, math.log(3)]], device=device, requires_grad=True)
    result = kk.kdrl_loss(
        logits,
        torch.eye(2, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        advantages=None,
        teacher_logprobs=torch.tensor([math.log(0.25) + 30], device=device),
        objective=kk.Objective(policy="off", kd="k3", kd_coef=1.0),
        impl=impl,
    )
    result.loss.backward()
    slope = 1 - math.exp(20)
    assert relative_error(result.loss, torch.tensor(11 * math.exp(20) - 31)) < 1e-5
    assert relative_error(logits.grad, torch.tensor([[0.75 * slope, -0.75 * slope]])) < 1e-5


def test_inside_the_bound_it_is_the_plain_formula() -> None:
    problem = _problem("cpu", F64, objective={"policy": "off", "k3_bound": 60.0}, off_policy=False)
    problem.options["token_weights"][:2] = 0  # l = -3e4 and -100 lie beyond
    exact = _by_autograd(problem, lambda lp, lq: (lq - lp).clamp(max=60).exp() - 1 - (lq - lp))
    ours = problem.solve(impl="torch")
    for name, value in exact.items():
        assert relative_error(ours[name], value) < 1e-12, name


def _verl(lp: Tensor, lq: Tensor) -> Tensor:
    """Bound l to ±20 and the value to ±10, as verl's "low_var_kl" does."""
    x = torch.clamp(lq - lp, min=-20, max=20)
    return torch.clamp(x.exp() - x - 1, min=-10, max=10)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bound_of_the_value_takes_the_gradient_of_the_tokens_that_differ_most(
    impl: str, device: str
) -> None:
    """So it is no option of Objective; linear_token_loss gives it to whom it must equal."""
    problem = _problem(device)
    student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
    options, kd_weight = problem.options, problem.options["kd_weight"]
    kk.linear_token_loss(
        tokens=problem.tokens,
        loss_fn=lambda rows: (
            0.5 * kd_weight[rows.index] * _verl(rows.logprobs, rows.teacher_logprobs)
        ),
        teacher_logprobs=options["teacher_logprobs"],
        token_weights=options["token_weights"],
        impl=impl,
        **student,
    ).loss.backward()
    exact = _by_autograd(problem, _verl)
    for name, tensor in student.items():
        assert relative_error(tensor.grad, exact[f"d{name}"]) < 1e-5, name
    zero = (student["hidden"].grad == 0).all(dim=1)
    assert zero.tolist() == [True] * 4 + [False, False, True]


def test_a_differentiable_ratio_gives_the_derivative_that_the_row_work_takes() -> None:
    """TRL and DeepSeek-V3.2 multiply k3 by the ratio with its gradient: all of it is s·l."""
    problem = _problem("cpu", F64, objective={"policy": "off", "kd_ratio_cap": 1e9})
    problem.options["token_weights"][[0, 1, 2]] = 0  # l beyond the bound
    problem.options["objective"] = replace(problem.options["objective"], kd="k3_ratio")
    old = problem.options["old_logprobs"]

    def trl(lp: Tensor, lq: Tensor) -> Tensor:
        ratio, x = torch.exp(lp - old), (lq - lp).clamp(max=20)
        return ratio * (torch.exp(x) - x - 1)

    exact, ours = _by_autograd(problem, trl), problem.solve(impl="torch")
    for name, value in exact.items():
        assert relative_error(ours[name], value) < 1e-9, name


@pytest.mark.parametrize("impl", IMPLS)
def test_a_capped_differentiable_ratio_keeps_its_weight_and_its_pull(
    impl: str, device: str
) -> None:
    """p = (1/4, 3/4), r = 4, cap 3, l = -2: value 3 (e^2 - 3), derivative 3 · -2 in log p."""
    logits = torch.tensor([[0.0, math.log(3)]], device=device, requires_grad=True)
    result = kk.kdrl_loss(
        logits,
        torch.eye(2, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        advantages=None,
        old_logprobs=torch.tensor([math.log(1 / 16)], device=device),
        teacher_logprobs=torch.tensor([math.log(0.25) + 2], device=device),
        objective=kk.Objective(policy="off", kd="k3_ratio", kd_coef=1.0, kd_ratio_cap=3.0),
        impl=impl,
    )
    result.loss.backward()
    assert relative_error(result.loss, torch.tensor(3 * (math.exp(2) - 3))) < 1e-6
    assert relative_error(logits.grad, torch.tensor([[-6 * 0.75, 6 * 0.75]])) < 1e-6
