"""Rows that have a gradient go to the front of their chunk, by the rule of rows/README.md."""

import math

import pytest
import torch
from torch import Tensor

from kdrl_kernels import rows
from kdrl_kernels.token_rows import Coefficients

FIELDS = ("logprobs", "entropy", "kl", "forward_kl", "lse", "rest", "extra")
PATTERNS = ["", "0", "1", "0001", "1110", "0110101", "1111111", "0000000", "000011111000111001"]


def _slots(pattern: str) -> list[int]:
    """Return the rule in plain Python."""
    used = [n for n, mark in enumerate(pattern) if mark == "1"]
    movers = iter(n for n in used if n >= len(used))
    sources = [s if s in used else next(movers) for s in range(len(used))]
    return sources + [-1] * (len(pattern) - len(used))


def _coefficients(pattern: str, field: str, value: float, device: str) -> Coefficients:
    """Return derivatives that are 0 but for `value` in one field of the marked rows."""
    marked = torch.tensor([mark == "1" for mark in pattern], dtype=torch.bool, device=device)
    zeros = torch.zeros(len(pattern), device=device)
    derivative: Tensor = torch.where(marked, value, zeros)
    if field == "extra":
        derivative = torch.stack([zeros, derivative], dim=1)
    values = {"logprobs": zeros, field: derivative}
    return Coefficients(**values)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("pattern", PATTERNS, ids="rows{}".format)
def test_slots_follow_the_rule(pattern: str, impl: str, device: str) -> None:
    options = {"BLOCK": 4} if impl == "triton" else {}  # several blocks
    coef = _coefficients(pattern, "logprobs", -0.5, device)
    source, count = rows.load(impl).slots(coef, **options)
    assert source.tolist() == _slots(pattern)
    assert count.tolist() == pattern.count("1")
    assert (source.dtype, count.dtype, count.ndim) == (torch.int64, torch.int64, 0)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("value", [1e-45, -math.inf, math.nan])
@pytest.mark.parametrize("field", FIELDS)
def test_any_derivative_other_than_0_keeps_a_row(
    field: str, value: float, impl: str, device: str
) -> None:
    coef = _coefficients("0010110", field, value, device)
    source, count = rows.load(impl).slots(coef)
    assert source.tolist() == _slots("0010110")
    assert count == 3


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_derivatives_may_be_views(impl: str, device: str) -> None:
    """Autograd gives one number to all rows without copying it."""
    one = torch.ones((), device=device).expand(5)
    every_other = torch.tensor([0.0, 7, 0, 7, 1, 7], device=device)[::2]
    assert rows.load(impl).slots(Coefficients(one))[0].tolist() == [0, 1, 2, 3, 4]
    source, count = rows.load(impl).slots(Coefficients(every_other))
    assert (source.tolist(), int(count)) == ([2, -1, -1], 1)
