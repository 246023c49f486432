"""Lists implementations and dtypes that can run here, as pytest parameters with readable ids."""

import os
from collections.abc import Sequence

import pytest
import torch

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def _param(impl: str, dtype: torch.dtype) -> object:
    marks = []
    if (impl, dtype) == ("triton", BF16):
        marks.append(pytest.mark.gpu)  # the interpreter gets bfloat16 wrong
    if (impl, dtype) == ("triton", F16):
        marks.append(pytest.mark.slow)  # the kernels of float32, with another rounding at the end
    return pytest.param(impl, dtype, marks=marks, id=f"{impl}-{str(dtype).removeprefix('torch.')}")


IMPL_DTYPES = [
    _param(impl, dtype) for impl in ("torch", "triton") for dtype in (F32, F16, BF16)
] + [_param("torch", F64), _param("reference", F32)]
IMPLS = ["reference", "torch", "triton"]
SEED = 1_000_000 * int(os.environ.get("KDRL_TEST_SEED", "0"))
"""Added to the seed of every random problem: other inputs for the same tests."""
KDS = [None, "k2", "k3", "k3_ratio", "rkl", "fkl", "jsd", "rkl+fkl"]


def quick_or_slow(impls: list[str], names: Sequence[str | None], slow: set[str]) -> list[object]:
    """Pair implementations with names; on Triton's interpreter, those of `slow` are marked so."""
    return [
        pytest.param(
            impl,
            name,
            marks=[pytest.mark.slow] if impl == "triton" and name in slow else [],
            id=f"{impl}-{name}",
        )
        for impl in impls
        for name in names
    ]
