"""A call's peak memory is inputs, outputs, gradients and the plan's workspace, without [N, V]."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kdrl_kernels as kk
from kdrl_kernels import buffers, one_pass
from tests.kernels.problem import make_problem

N, H, V = 96, 16, 4096
SMALL_BYTES = 100_000
"""[N] results, coefficients, Python's own tensors: a thousand bytes a row."""


def _peak_bytes(call: Callable[[], object]) -> int:
    """Return the most memory that was allocated at once during a call, beyond that before it."""
    # acc_events: without it torch 2.11 warns
    options = {"profile_memory": True, "acc_events": True}
    with profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("kd", [None, "k2", "k2-kl", "rkl", "fkl", "jsd", "rkl+fkl"])
@pytest.mark.parametrize("rows", [8, 32])
def test_peak_is_the_plan_and_the_gradients(rows: int, kd: str | None) -> None:
    kd, baseline = kd.split("-") if kd == "k2-kl" else (kd, None)
    objective = {"entropy_coef": 0.1, "kd_baseline": baseline}
    problem = make_problem(N, H, V, kd=kd, bias=False, objective=objective)
    teacher = (H + 3, V) if kd else None
    sizes = {"teacher": teacher, "kd": kd, "kd_baseline": baseline, "device": "cpu"}
    sizes |= {"dtype": torch.float32}
    budget = kk.chunk_plan(N, H, V, **sizes).geometry.chunk_bytes(rows)
    plan = kk.chunk_plan(N, H, V, **sizes, workspace_bytes=budget)
    assert plan.rows == rows
    assert plan.workspace_bytes <= budget
    student = 2 * 4 * (N * H + V * H)  # solve() clones the inputs, and keeps their gradients
    assert plan.gradient_bytes == student // 2
    problem.solve(impl="torch", workspace_bytes=budget)  # not the first call of a process
    peak = _peak_bytes(lambda: problem.solve(impl="torch", workspace_bytes=budget))
    assert peak <= student + 1.05 * plan.workspace_bytes + SMALL_BYTES
    assert peak >= student + 0.5 * plan.rows * plan.geometry.streams * V * 4  # it sees the logits


def test_the_rows_of_a_baseline_are_those_that_both_streams_leave_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"teacher": (H + 3, V), "kd": "k2", "kd_baseline": "kl", "device": "cpu"}
    whole = kk.chunk_plan(N, H, V, dtype=torch.float32, **sizes)
    seen, Buffers = [], buffers.Buffers

    def recorded(*args: Any) -> buffers.Buffers:
        seen.append(args[2:4])
        return Buffers(*args)

    monkeypatch.setattr(one_pass, "Buffers", recorded)
    problem = make_problem(N, H, V, bias=False, objective={"kd_baseline": "kl"})
    problem.solve(impl="torch", workspace_bytes=whole.geometry.chunk_bytes(8))
    assert seen == [(8, 2)]


def test_an_adapter_copies_the_weight_and_holds_no_gradient_of_it() -> None:
    r, H = 8, 256
    problem = make_problem(N, H, V, kd=None, bias=False)
    hidden = problem.student["hidden"].requires_grad_()
    weight, A, B = problem.student["weight"], torch.randn(r, H), torch.zeros(V, r)
    adapter = kk.LowRank(A.requires_grad_(), B.requires_grad_())
    options = {"dtype": torch.float32, "device": "cpu", "adapter": r}
    budget = kk.chunk_plan(N, H, V, **options).geometry.chunk_bytes(8)
    plan = kk.chunk_plan(N, H, V, **options, workspace_bytes=budget)

    def call() -> None:
        arguments = {"tokens": problem.tokens, "workspace_bytes": budget, "impl": "torch"}
        out = kk.kdrl_loss(hidden, weight, adapter=adapter, **arguments, **problem.options)
        out.loss.backward()

    call()
    hidden.grad = A.grad = B.grad = None
    peak, expected = _peak_bytes(call), plan.workspace_bytes + plan.gradient_bytes + plan.copy_bytes
    assert plan.rows == 8
    assert peak <= expected + SMALL_BYTES
    assert peak >= plan.copy_bytes + 0.5 * 8 * V * 4
    assert expected - plan.copy_bytes < V * H * 4


def test_the_reference_does_hold_all_logits() -> None:
    """The measurement above shows [N, V] logits where they are held."""
    problem = make_problem(N, H, V, kd="rkl")
    assert _peak_bytes(lambda: problem.solve(impl="reference")) >= 4 * N * V * 4


def test_a_cache_is_held_until_backward() -> None:
    problem = make_problem(N, H, V, kd=None, bias=False)
    student = {k: v.requires_grad_() for k, v in problem.student.items()}
    peaks = [
        _peak_bytes(
            lambda cache=cache: (
                kk.linear_logprobs(
                    tokens=problem.tokens,
                    cache_bytes=cache,
                    workspace_bytes=16 * (V * 4 * 7 + 500),
                    impl="torch",
                    **student,
                ).logprobs
            )
        )
        for cache in (0, N * V * 4)
    ]
    assert peaks[1] - peaks[0] >= 0.8 * (N - 16) * V * 4
