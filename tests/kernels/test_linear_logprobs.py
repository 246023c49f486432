"""linear_logprobs matches its definition in float64, also under a loss of the caller."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import F64, IMPL_DTYPES
from tests.kernels.problem import make_problem
from tests.tolerance import assert_matches

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.6},
    "temperature_of_each_row": {"temperature": torch.linspace(0.5, 1.5, 7)},
}


def _solve(
    dtype: torch.dtype, device: str, cast: Any, impl: str, **options: Any
) -> dict[str, Tensor]:
    """Return outputs, and gradients of a sum with random weights."""
    problem = make_problem(kd=None, dtype=dtype, device=device).map(cast)
    student = {k: v.requires_grad_() for k, v in problem.student.items()}
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    out = kk.linear_logprobs(tokens=problem.tokens, entropy=True, impl=impl, **student, **options)
    upstream = torch.randn(2, 7, generator=torch.Generator().manual_seed(1)).to(out.logprobs)
    (out.logprobs @ upstream[0] + out.entropy @ upstream[1]).backward()
    results = {"logprobs": out.logprobs.detach(), "entropy": out.entropy.detach()}
    return results | {f"d{k}": v.grad for k, v in student.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
def test_matches_definition(
    impl: str, dtype: torch.dtype, options: dict[str, Any], device: str
) -> None:
    ours = _solve(dtype, device, lambda x: x, impl, **options)

    def reference(cast: torch.dtype) -> dict[str, Tensor]:
        return _solve(dtype, device, lambda x: x.to(cast), "reference", **options)

    assert_matches(ours, reference)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_sequence_level_ratio(impl: str, device: str) -> None:
    """GSPO needs all log-probabilities of a sequence before its loss is known."""
    dtype = F64 if impl == "torch" else torch.float32
    problem = make_problem(8, kd=None, device=device, dtype=dtype)
    gradients = []
    for name in (impl, "reference"):
        weight = problem.student["weight"].clone().requires_grad_()
        lp = kk.linear_logprobs(
            problem.student["hidden"], weight, problem.tokens, impl=name
        ).logprobs
        ratio = (lp - problem.options["old_logprobs"]).view(2, 4).mean(1).exp()
        (ratio * torch.tensor([1.0, -2.0], device=device)).sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_chunks_do_not_change_a_bit_of_the_ratio(impl: str, device: str) -> None:
    """With equal weights and rows per chunk, linear_logprobs and kdrl_loss give the same bits."""
    problem = make_problem(16, kd=None, device=device, off_policy=False)
    budget = {"workspace_bytes": 64 * 37, "impl": impl}
    old = kk.linear_logprobs(tokens=problem.tokens, **problem.student, **budget).logprobs
    student = problem.student | {"tokens": problem.tokens}
    options = problem.options | {"old_logprobs": old, "token_weights": None}
    result = kk.kdrl_loss(**student, **options, **budget)
    assert torch.equal(result.logprobs, old)
    assert result.metrics["ratio_max"] == 1
    assert result.metrics["ratio_sum"] == 16


def test_gradient_through_entropy_alone(device: str) -> None:
    problem = make_problem(kd=None, device=device)
    weights = [problem.student["weight"].clone().requires_grad_() for _ in range(2)]
    for weight, impl in zip(weights, ("torch", "reference"), strict=True):
        hidden = problem.student["hidden"]
        out = kk.linear_logprobs(hidden, weight, problem.tokens, entropy=True, impl=impl)
        out.entropy.sum().backward()
    torch.testing.assert_close(weights[0].grad, weights[1].grad, rtol=1e-4, atol=1e-5)
