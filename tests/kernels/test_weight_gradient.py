"""On a GPU dW is written in its dtype at once, or its float32 sum is the gradient as it is.

A CPU computes otherwise; here it is told that it is a GPU.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels import chunks, gradients, one_pass
from kdrl_kernels.operators import loss as loss_op
from tests.kernels.params import BF16, F16, F32, F64
from tests.kernels.problem import Problem, assert_solves, make_problem
from tests.kernels.test_operators import _recorded

GPU_KDS = [None, "rkl"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[one_pass.Pass]:
    """Make a CPU take the way of a GPU, for heads of any size; return the passes that run."""
    monkeypatch.setattr(gradients, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(chunks, "DIRECT_ELEMENTS", 1)
    passes: list[one_pass.Pass] = []
    real = one_pass.run

    def recorded(*args: Any, **options: Any) -> one_pass.Pass:
        passes.append(real(*args, **options))
        return passes[-1]

    monkeypatch.setattr(one_pass, "run", recorded)
    return passes


def _mixed(problem: Problem) -> Problem:
    """Return a problem whose weight and bias are float32, beside bfloat16 hidden states."""
    wide = {k: v if k == "hidden" else v.float() for k, v in problem.student.items()}
    return replace(problem, student=wide)


@pytest.mark.parametrize("upstream", [1.0, 0.7])
@pytest.mark.parametrize("kd", GPU_KDS)
def test_one_chunk_is_written_in_bfloat16(
    kd: str | None, upstream: float, gpu: list[one_pass.Pass]
) -> None:
    problem = make_problem(kd=kd, dtype=BF16)
    problem.options["token_weights"][2] = 0
    ours = problem.solve(upstream, impl="torch")
    assert gpu[0].gradients.weight.dtype == BF16
    assert gpu[0].scale == 1
    assert_solves(problem, ours, upstream)


@pytest.mark.parametrize("upstream", [1.0, 0.7])
@pytest.mark.parametrize("rows", [2, 7])
@pytest.mark.parametrize("kd", GPU_KDS)
def test_a_float32_sum_is_the_gradient_of_a_float32_weight(
    kd: str | None, rows: int, upstream: float, gpu: list[one_pass.Pass]
) -> None:
    problem = _mixed(make_problem(kd=kd, dtype=BF16, bias=False))
    geometry = kk.chunk_plan(
        7, 16, 37, teacher=(19, 37) if kd else None, kd=kd, device="cpu"
    ).geometry
    budget = geometry.chunk_bytes(rows)
    student = {k: v.detach().clone().requires_grad_() for k, v in problem.student.items()}
    teacher = kk.TeacherHead(**problem.teacher) if problem.teacher else None
    options = {"teacher": teacher, "workspace_bytes": budget} | problem.options
    out = kk.kdrl_loss(tokens=problem.tokens, **student, **options)
    (out.loss * upstream).backward()
    (result,) = gpu
    assert result.scale == 1
    assert result.gradients.weight.dtype == F32
    assert student["weight"].grad.data_ptr() == result.gradients.weight.data_ptr()
    rounded = replace(problem, student={k: v.bfloat16() for k, v in problem.student.items()})
    exact = rounded.map(Tensor.double).solve(upstream, impl="reference")["dweight"]
    error = (student["weight"].grad - exact).abs().max() / exact.abs().max()
    assert error < 4e-3  # of dz, which is rounded to bfloat16


def test_more_chunks_of_bfloat16_are_summed_as_ever(
    gpu: list[one_pass.Pass], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, budget = make_problem(dtype=BF16), 6000
    on_gpu = problem.solve(impl="torch", workspace_bytes=budget)
    assert gpu[0].gradients.weight.dtype == F32
    monkeypatch.undo()
    on_cpu = problem.solve(impl="torch", workspace_bytes=budget)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=0)


def test_what_is_not_written_at_once(gpu: list[one_pass.Pass]) -> None:
    """float16 has too small a range, and other dtypes have no float32 sum to be rounded."""
    for dtype in (F16, F32, F64):
        make_problem(kd=None, dtype=dtype).solve(impl="torch")
        assert gpu[-1].gradients.weight.dtype == torch.promote_types(dtype, F32)
    small = make_problem(kd=None, dtype=BF16)
    chunks.DIRECT_ELEMENTS = 37 * 16 + 1
    small.solve(impl="torch")
    assert gpu[-1].gradients.weight.dtype == F32


def test_a_cpu_sums_in_float32() -> None:
    size = 1 << 12
    hidden = torch.zeros(1, size, dtype=BF16)
    head = kk.TeacherHead(hidden, hidden.expand(size, size))
    assert not gradients.writes_at_once(head, one_chunk=True)
    assert not gradients.sums_need_no_rounding(head)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("call", ["linear_logprobs", "linear_token_loss"])
def test_the_other_functions_write_at_once_too(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], gradients.Gradients.finish_

    def recorded(self: gradients.Gradients, *args: Any) -> Tensor:
        seen.append(self.weight.dtype)
        return real(self, *args)

    monkeypatch.setattr(gradients.Gradients, "finish_", recorded)
    problem = make_problem(kd=None, dtype=BF16, bias=False)
    results = []
    for dtype in (BF16, F64):
        student = {k: v.detach().to(dtype).requires_grad_() for k, v in problem.student.items()}
        if call == "linear_logprobs":
            loss = -kk.linear_logprobs(tokens=problem.tokens, **student).logprobs.mean()
        else:
            loss = kk.linear_token_loss(
                tokens=problem.tokens, loss_fn=lambda rows: -rows.logprobs, **student
            ).loss
        loss.backward(retain_graph=True)
        first = student["weight"].grad.clone()
        student["weight"].grad = None
        loss.backward()  # a second pass reads what the first one has left
        assert torch.equal(student["weight"].grad, first)
        results.append(first.double())
    assert set(seen) == {BF16, F64}
    assert (results[0] - results[1]).abs().max() < 2**-7 * results[1].abs().max()


@pytest.mark.usefixtures("gpu")
def test_the_operator_knows_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _recorded(monkeypatch, loss_op, "_loss")
    problem = make_problem(kd=None, dtype=BF16)
    student = {k: v.requires_grad_() for k, v in problem.student.items()}
    kk.kdrl_loss(tokens=problem.tokens, impl="torch", **student, **problem.options)
    call = loss_op.LAYOUT.rebuild(seen[0])
    assert (call.direct, call.folded) == (True, True)
    arguments = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, seen[0])
    outcome = torch.library.opcheck(
        torch.ops.kdrl.loss.default, arguments, test_utils="test_faketensor"
    )
    assert outcome == {"test_faketensor": "SUCCESS"}
