"""Chunk size, micro-batches, order of rows and a second run do not change a result."""

from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels import gemm
from kdrl_kernels.chunks import padded
from kdrl_kernels.rows import blocks as row_work
from tests.kernels.params import F32, F64, quick_or_slow
from tests.kernels.problem import Problem, assert_solves, make_problem
from tests.tolerance import relative_error

V = 37
ROW_BYTES = {dtype: (padded(V) * (2 + 6) + 16 + 19 + 16) * dtype.itemsize for dtype in (F32, F64)}
"""Two streams and the six temporaries of the PyTorch row work; gathered hidden states and dX."""


def _assert_same(
    problem: Problem, ours: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-10
) -> None:
    """Assert equality to the bound in float64; in float32, to rounding of the same problem."""
    if ours["loss"].dtype == F32:
        assert_solves(problem, ours)
        return
    for name, value in ours.items():
        error = relative_error(value, expected[name])
        assert error <= bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kd", ["k2", "rkl"])
def test_rows_per_chunk(kd: str, rows: int, dtype: torch.dtype, device: str) -> None:
    problem = make_problem(20, V=V, kd=kd, dtype=dtype, device=device)
    budget = {"workspace_bytes": rows * ROW_BYTES[dtype]}
    _assert_same(problem, problem.solve(impl="torch", **budget), problem.solve(impl="torch"))


@pytest.mark.parametrize("kd", ["k2", "rkl"])
def test_rows_per_block(kd: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(20, V=V, kd=kd, dtype=F64, device=device)
    problem.options["temperature"] = torch.linspace(0.5, 1.5, 20, device=device)
    problem.options["softcap"] = 4.0
    expected = problem.solve(impl="torch")
    for name in ("CPU_BLOCK_ELEMENTS", "GPU_BLOCK_ELEMENTS"):
        monkeypatch.setattr(row_work, name, 3 * V)  # 20 rows: six blocks and a rest
    _assert_same(problem, problem.solve(impl="torch"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_columns_widened_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(20, V=V, kd="rkl", dtype=dtype)
    expected = problem.solve(impl="torch")
    monkeypatch.setattr(gemm, "WIDEN_ELEMENTS", 8 * 16)  # 37 columns: four blocks and a rest
    bound = 4 * torch.finfo(dtype).eps  # the sums over columns are taken in another order
    for name, value in problem.solve(impl="torch").items():
        assert relative_error(value, expected[name]) <= bound, name


def _micro_batches(problem: Problem, parts: list[Tensor], impl: str) -> dict[str, Tensor]:
    """Add up gradients over micro-batches that share one normalizer."""
    student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
    normalizer = problem.options["token_weights"].sum()
    loss = torch.zeros_like(normalizer)
    for part in parts:
        cut = {k: v[part] if isinstance(v, Tensor) else v for k, v in problem.options.items()}
        result = kk.kdrl_loss(
            student["hidden"][part],
            student["weight"],
            problem.tokens[part],
            bias=student["bias"],
            teacher=kk.TeacherHead(problem.teacher["hidden"][part], problem.teacher["weight"]),
            impl=impl,
            **cut | {"normalizer": normalizer},
        )
        result.loss.backward()
        loss += result.loss.detach()
    return {"loss": loss} | {f"d{k}": v.grad for k, v in student.items()}


@pytest.mark.parametrize(
    ("impl", "dtype", "kd"),
    [
        *(("torch", dtype, kd) for dtype in (F64, F32) for kd in ("k2", "rkl")),
        ("triton", F32, "rkl"),
        pytest.param("triton", F32, "k2", marks=pytest.mark.slow),
    ],
)
def test_micro_batches_and_order(kd: str, impl: str, dtype: torch.dtype, device: str) -> None:
    problem = make_problem(20, V=V, kd=kd, dtype=dtype, device=device)
    expected = problem.solve(impl=impl)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).to(device)
    for parts in ([order], list(order.split(7)), list(order.split(1))):
        _assert_same(problem, _micro_batches(problem, parts, impl), expected)


@pytest.mark.parametrize(
    ("impl", "kd"), quick_or_slow(["torch", "triton"], ["k2", "rkl", "fkl", "jsd"], {"fkl", "jsd"})
)
def test_two_runs_are_bitwise_equal(kd: str, impl: str, device: str) -> None:
    problem = make_problem(33, kd=kd, device=device)
    first, second = problem.solve(impl=impl), problem.solve(impl=impl)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_constant_added_to_all_logits_changes_nothing(impl: str, device: str) -> None:
    problem = make_problem(kd="rkl", device=device, dtype=F32)
    shifted = problem.map(lambda x: x)
    shifted.student["bias"] = problem.student["bias"] + 8.0
    expected = problem.solve(impl=impl)
    results = shifted.solve(impl=impl)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_layout_of_inputs_does_not_matter(impl: str, device: str) -> None:
    """A transposed weight and a strided hidden give the same gradients, in their layout."""
    problem = make_problem(device=device)
    expected = problem.solve(impl=impl)
    strided: dict[str, Any] = problem.student | {
        "weight": problem.student["weight"].T.contiguous().T,
        "hidden": torch.stack([problem.student["hidden"]] * 2, dim=2)[:, :, 0],
    }
    student = {k: v.detach().requires_grad_() for k, v in strided.items()}
    assert not student["weight"].is_contiguous()
    assert not student["hidden"].is_contiguous()
    teacher = kk.TeacherHead(**problem.teacher)
    options = {**problem.options, "teacher": teacher, "impl": impl}
    kk.kdrl_loss(tokens=problem.tokens, **student, **options).loss.backward()
    for name, tensor in student.items():
        torch.testing.assert_close(tensor.grad, expected[f"d{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_layout_of_row_tensors_does_not_matter(layout: str, impl: str, device: str) -> None:
    problem = make_problem(device=device)
    names = ("advantages", "old_logprobs", "kd_weight")
    if layout == "expanded":
        problem.options.update({k: problem.options[k][:1].expand(7) for k in names})
    problem.options["token_weights"] = None  # weights would gather, and so copy, the rows
    expected = problem.solve(impl="reference")
    if layout == "strided":
        for name in names:
            problem.options[name] = torch.stack([problem.options[name]] * 3, dim=1)[:, 1]
    assert not problem.options["advantages"].is_contiguous()
    for name, value in problem.solve(impl=impl).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_a_tied_embedding_gets_both_gradients(device: str) -> None:
    """The head weight is used before the head too: autograd adds the two gradients."""
    problem = make_problem(kd=None, device=device, dtype=F64, bias=False)
    options = problem.options
    gradients = []
    for impl in ("torch", "reference"):
        weight = problem.student["weight"].clone().requires_grad_()
        hidden = weight[problem.tokens] * 2 + problem.student["hidden"]
        kk.kdrl_loss(hidden, weight, problem.tokens, impl=impl, **options).loss.backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_backward_any_number_of_times(dtype: torch.dtype, upstream: float) -> None:
    """Each backward gives the whole gradient, whatever was done to the gradient before it."""
    problem = make_problem(20, V=V, kd="rkl", dtype=dtype)
    expected = problem.solve(upstream, impl="torch")
    student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
    teacher = kk.TeacherHead(**problem.teacher)
    options = problem.options | {"impl": "torch", "teacher": teacher}
    loss = kk.kdrl_loss(tokens=problem.tokens, **student, **options).loss * upstream
    for last in (False, False, True):
        loss.backward(retain_graph=not last)
        for name, tensor in student.items():
            assert torch.equal(tensor.grad, expected[f"d{name}"])
            tensor.grad.zero_()
            tensor.grad = None


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kd", ["k2", "rkl", "jsd"])
def test_on_policy_ratio_is_exactly_1_by_default(kd: str, dtype: torch.dtype) -> None:
    """Every loss has the same rows per chunk, so old and new log-probabilities have equal bits."""
    problem = make_problem(20, V=V, kd=kd, dtype=dtype, off_policy=False)
    old = kk.linear_logprobs(tokens=problem.tokens, impl="torch", **problem.student).logprobs
    results = problem.solve(impl="torch", old_logprobs=old)
    assert torch.equal(results["logprobs"], old)
