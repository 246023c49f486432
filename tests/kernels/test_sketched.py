"""What a loss with a sketched backward pass returns is what the exact one returns, to the bit."""

import itertools
from typing import Any

import pytest
import torch

import kdrl_kernels as kk
from kdrl_kernels.objective import Kd
from tests.kernels.problem import make_problem

KDS: tuple[Kd | None, ...] = (None, "k2", "k3", "k3_ratio", "rkl", "fkl", "jsd", "rkl+fkl")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("kd", KDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_those_of_exact(kd: Kd | None, dtype: torch.dtype) -> None:
    """For each policy loss and softcap; the clipped and the capped rows are among them."""
    for policy, softcap in itertools.product(("clip", "none", "off"), (None, 3.0)):
        if policy == "off" and kd is None:
            continue  # no objective
        objective = {"policy": policy, "entropy_coef": 0.1, "clip_high": 0.3}
        problem = make_problem(
            40, H=24, V=200, kd=kd, dtype=dtype, softcap=softcap, objective=objective, entropy=True
        )
        if policy == "off":
            problem.options["advantages"] = None
        exact = problem.solve()
        sketch = kk.Sketch(threshold=0.1, flat=1.5 * 64 / 200)  # some rows are flat, some are not
        ours = problem.solve(backward="sketch", sketch=sketch)
        assert ours.keys() == exact.keys()
        for name, value in exact.items():
            same = torch.equal(ours[name], value)
            assert same == (not name.startswith("d")), (name, policy, softcap)


@pytest.mark.parametrize("cache_bytes", [0, 10_000, 10**6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities_are_those_of_exact(dtype: torch.dtype, cache_bytes: int) -> None:
    """No logits are kept, whatever cache_bytes is: backward reads none."""
    problem = make_problem(40, H=24, V=200, kd=None, dtype=dtype)
    head: Any = problem.student["hidden"].requires_grad_(), problem.student["weight"]
    options: dict[str, Any] = {"bias": problem.student["bias"], "entropy": True}
    options |= {"workspace_bytes": 20_000, "cache_bytes": cache_bytes}
    exact = kk.linear_logprobs(*head, problem.tokens, **options)
    ours = kk.linear_logprobs(*head, problem.tokens, backward="sketch", **options)
    assert torch.equal(ours.logprobs, exact.logprobs)
    assert ours.entropy is not None
    assert exact.entropy is not None
    assert torch.equal(ours.entropy, exact.entropy)
