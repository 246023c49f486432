"""The tests' way of running Triton's interpreter: it searches triton.language once a launch."""

from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no Triton on this platform")
import triton
import triton.language as tl
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")


@triton.jit
def _double(x):
    return x + x


@triton.jit
def _kernel(x_ptr, out_ptr, N: tl.constexpr):
    """out[n] = 8 x[n]"""
    n = tl.arange(0, N)
    x = tl.load(x_ptr + n)
    for _ in range(3):
        x = _double(x)
    tl.store(out_ptr + n, x)


def test_each_launch_searches_once_and_leaves_the_language_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searches: Counter[str] = Counter()
    search, load = interpreter._patch_builtin, tl.load

    def counted(package: Any, *arguments: Any) -> None:
        searches[package.__name__] += 1
        search(package, *arguments)

    monkeypatch.setattr(interpreter, "_patch_builtin", counted)
    x = torch.arange(4.0)
    for launch in (1, 2):
        out = torch.full((4,), torch.nan)
        _kernel[(1,)](x, out, N=4)
        assert torch.equal(out, 8 * x)
        assert searches["triton.language"] == launch
        assert tl.load is load
