"""Chooses the unit in which gradients of logits are stored where they are float16.

float16 ends at 65,504 and rounds what is below 6e-8 to 0, so dL/dlogits is divided by a power of
two. rows/README.md derives the bound, by which nothing overflows in any unit that is chosen here.
"""

import torch
from torch import Tensor

from kdrl_kernels.rows.streams import Stats
from kdrl_kernels.token_rows import Coefficients

START = 2.0**11
"""A new unit makes the bound less than this: 2^11 more of float16's range than 1 would use."""
LARGEST = 2.0**15
"""A unit stays while the bound is at most this; float16 ends at twice as much."""
EXPONENT = 0x7F80_0000
"""The bits of a float32's exponent; alone, they are the power of two at or below it."""


def first_unit(like: Tensor) -> Tensor:
    """Return the unit of a pass before its first chunk, 0-d float32."""
    return like.new_full((), torch.finfo(torch.float32).tiny, dtype=torch.float32)


def next_unit(unit: Tensor, bound: Tensor) -> Tensor:
    """Return the unit for gradients up to a bound: the same one if it can be.

    A bound that is no number gives an infinite unit, so that every gradient is NaN.
    """
    power = (bound.view(torch.int32) & EXPONENT).view(torch.float32)  # exact, with no logarithm
    new = (power * (2 / START)).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(bound <= unit * LARGEST, unit, new)


def gradient_bound(coef: Coefficients, stats: Stats, temperature: float | Tensor) -> Tensor:
    """Return a bound of the absolute gradient of every logit of some rows, 0-d; 0 without rows."""
    total = coef.logprobs.abs()
    for factor in (coef.lse, coef.forward_kl, coef.rest):
        if factor is not None:
            total = total + factor.abs()
    for factor, value in ((coef.entropy, stats.entropy), (coef.kl, stats.kl)):
        if factor is not None:
            total = total + factor.abs() * (1 + _size(value, factor))
    if coef.extra is not None:
        total = total + coef.extra.abs().sum(dim=1)
    total = (total / temperature).to(torch.float32)
    return total.amax() if len(total) else total.sum()


def _size(value: Tensor | None, factor: Tensor) -> Tensor:
    """Return |value| of each row, 0 where it is not finite: no unit makes that gradient finite."""
    if value is None:
        return torch.zeros_like(factor)
    return torch.where(value.isfinite() & factor.ne(0), value.abs(), 0)
