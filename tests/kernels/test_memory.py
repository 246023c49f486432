"""Peak memory of a call: the plan's workspace beside inputs, outputs and gradients, no [N, V]."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kdrl_kernels as kk
from tests.kernels.problem import make_problem

N, H, V = 96, 16, 4096
SMALL_BYTES = 100_000
"""[N] results, coefficients, Python's own tensors: a thousand bytes a row."""


def _peak_bytes(call: Callable[[], object]) -> int:
    """The most that the allocator had given out at once during the call, beyond what it had."""
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


@pytest.mark.parametrize("kd", [None, "k2", "rkl", "fkl", "jsd"])
@pytest.mark.parametrize("rows", [8, 32])
def test_peak_is_the_plan_and_the_gradients(rows: int, kd: str | None) -> None:
    problem = make_problem(N, H, V, kd=kd, bias=False, objective={"entropy_coef": 0.1})
    teacher = (H + 3, V) if kd else None
    sizes = {"teacher": teacher, "kd": kd, "device": "cpu", "dtype": torch.float32}
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


def test_the_reference_does_hold_all_logits() -> None:
    """What the test above watches for is seen where it happens."""
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
