"""No tensor of N x V elements, and none beyond the rows the plan allows."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.problem import make_problem

N, H, V = 96, 4, 1024


class LargestTensor(TorchDispatchMode):
    """Watches every operator for the largest tensor it returns, in elements."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def _largest(impl: str, kd: str | None, dtype: torch.dtype, **options: Any) -> int:
    problem = make_problem(N, H, V, kd=kd, dtype=dtype, objective={"entropy_coef": 0.1})
    with LargestTensor() as watch:
        problem.solve(impl=impl, **options)
    return watch.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kd", [None, "k2", "rkl", "fkl", "jsd"])
def test_rows_of_logits_stay_within_the_budget(kd: str | None, dtype: torch.dtype) -> None:
    rows = 8
    streams = 2 if kd in ("rkl", "fkl", "jsd") else 1
    budget = rows * (V * 4 * (streams + 6) + 64)  # six temporaries of the row work
    elements = 2 if dtype == torch.bfloat16 else 1  # a view of float32 memory as bfloat16
    assert _largest("torch", kd, dtype, workspace_bytes=budget) <= rows * V * elements


def test_the_reference_does_hold_all_logits() -> None:
    """What the test above watches for is seen where it happens."""
    assert _largest("reference", "rkl", torch.float32) >= N * V
