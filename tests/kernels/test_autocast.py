"""Autocast changes no number of any implementation, in the forward or in the backward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels.autocast import Project
from tests.kernels.params import IMPLS
from tests.kernels.problem import make_problem


def _kdrl_loss(problem: Any, student: dict[str, Tensor], impl: str) -> list[Tensor]:
    teacher = kk.TeacherHead(**problem.teacher)
    out = kk.kdrl_loss(
        tokens=problem.tokens, teacher=teacher, impl=impl, **student, **problem.options
    )
    return [out.loss, out.logprobs, out.kl, out.metrics["ratio_sum"]]


def _linear_logprobs(problem: Any, student: dict[str, Tensor], impl: str) -> list[Tensor]:
    out = kk.linear_logprobs(tokens=problem.tokens, entropy=True, impl=impl, **student)
    return [(out.logprobs + out.entropy).sum(), out.logprobs]


def _linear_token_loss(problem: Any, student: dict[str, Tensor], impl: str) -> list[Tensor]:
    """Its loss holds a matrix product, which autocast would round to 16 bits."""
    mix = problem.options["advantages"].diag()

    def loss_fn(rows: kk.Rows) -> Tensor:
        factors = mix[rows.index][:, rows.index] @ rows.logprobs.detach()
        return factors * rows.logprobs

    return [kk.linear_token_loss(tokens=problem.tokens, loss_fn=loss_fn, impl=impl, **student).loss]


@pytest.mark.parametrize("function", [_kdrl_loss, _linear_logprobs, _linear_token_loss])
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_no_number(
    impl: str, function: Callable[..., list[Tensor]], device: str
) -> None:
    problem = make_problem(kd="rkl", device=device)
    results = []
    for enabled in (False, True):
        student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            outputs = function(problem, student, impl)
            outputs[0].backward()
        results.append([*outputs, *(x.grad for x in student.values())])
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def test_the_product_of_the_reference_has_every_derivative() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    inputs = left.requires_grad_(), right.requires_grad_()
    assert torch.equal(Project.apply(*inputs), left @ right.T)
    assert torch.autograd.gradcheck(Project.apply, inputs)
    assert torch.autograd.gradgradcheck(Project.apply, inputs)
