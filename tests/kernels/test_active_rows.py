"""A caller that knows how many token weights are not 0 is not waited for, and gets the same."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels import checks
from tests.kernels.problem import Problem, make_problem

WEIGHTS = [[0.0, 2, 0, 0.5, 1, 0, 0], [1.0, 2, 0.25, 0.5, 1, 3, 1], [0.0] * 7]
"""[N] with some, all and no rows that count."""


def _problem(weights: list[float], device: str) -> Problem:
    problem = make_problem(kd="rkl", device=device)
    problem.options["token_weights"] = torch.tensor(weights, device=device)
    return problem


def _token_loss(problem: Problem, **options: Any) -> dict[str, Tensor]:
    student = {k: v.detach().clone().requires_grad_() for k, v in problem.student.items()}
    out = kk.linear_token_loss(
        tokens=problem.tokens,
        loss_fn=lambda rows: -rows.logprobs,
        token_weights=problem.options["token_weights"],
        normalizer=2.0,
        **student,
        **options,
    )
    out.loss.backward()
    gradients = {name: x.grad for name, x in student.items() if x.grad is not None}
    return {"loss": out.loss.detach(), "logprobs": out.logprobs} | gradients


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["some", "all", "none"])
def test_their_number_changes_no_bit(weights: list[float], impl: str, device: str) -> None:
    problem = _problem(weights, device)
    known = {"active_rows": sum(w != 0 for w in weights)}
    for solve in (
        lambda **o: problem.solve(normalizer=2.0, **o),
        lambda **o: _token_loss(problem, **o),
    ):
        results, expected = (solve(impl=impl, **options) for options in (known, {}))
        assert results.keys() == expected.keys()
        for name, values in results.items():
            assert torch.equal(values, expected[name]), name


@pytest.mark.parametrize("active", [2, 4, 7])
def test_a_wrong_number_raises_on_a_cpu(active: int) -> None:
    problem = _problem(WEIGHTS[0], "cpu")
    with pytest.raises(ValueError, match=f"active_rows must be .* not 0, 3, got {active}$"):
        problem.solve(active_rows=active)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("active", [0, 2, 4, 7])
def test_a_wrong_number_makes_the_loss_nan_on_a_gpu(
    active: int, impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raising would wait; a CPU stands for it where there is none."""
    monkeypatch.setattr(checks, "is_read", lambda _: False)
    problem = _problem(WEIGHTS[0], device)
    teacher = kk.TeacherHead(**problem.teacher or {})
    options = problem.options | {"active_rows": active, "impl": impl, "normalizer": 2.0}
    out = kk.kdrl_loss(tokens=problem.tokens, teacher=teacher, **problem.student, **options)
    assert out.loss.isnan()
    assert out.metrics["bad_tokens"] == abs(active - 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"active_rows": 8}, ValueError, "active_rows must be in [0, N] with N = 7, got 8"),
        ({"active_rows": -1}, ValueError, "active_rows must be in [0, N] with N = 7, got -1"),
        ({"active_rows": 3.0}, TypeError, "active_rows must be an integer or None, got 3.0"),
        (
            {"active_rows": 3, "token_weights": None},
            ValueError,
            "active_rows must be None without token_weights, got 3",
        ),
    ],
)
def test_a_number_that_cannot_be_right(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        _problem(WEIGHTS[0], "cpu").solve(**options)
