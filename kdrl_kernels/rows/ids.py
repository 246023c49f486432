"""Defines log-probabilities at K columns of each row, and that of the rest. Maths: README.md."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdrl_kernels.token_rows import Coefficients


@dataclass(frozen=True, slots=True)
class IdStats:
    """Holds log-probabilities at K columns of each row, in nats."""

    columns: Tensor
    """[C, K] int64; -1: none."""
    logprobs: Tensor
    """[C, K], log p of the columns; 0 where there is none."""
    teacher_logprobs: Tensor | None = None
    """[C, K], log q of the columns, where both streams are swept."""
    rest: Tensor | None = None
    """[C], log of the probability on all other columns, by log_mass."""

    def live(self, coef: Coefficients) -> Coefficients:
        """Return coef with 0 where what it belongs to is a constant: no id, or probability 0."""
        extra, rest = coef.extra, coef.rest
        if extra is not None:
            constant = (self.columns < 0) | (self.logprobs == -math.inf)
            extra = extra.masked_fill(constant, 0)
        if rest is not None and self.rest is not None:
            none = (self.columns < 0).all(dim=1)  # the rest is everything
            rest = rest.masked_fill(none | (self.rest == -math.inf), 0)
        return replace(coef, extra=extra, rest=rest)


def filled(columns: Tensor, tokens: Tensor) -> Tensor:
    """Return columns [C, K] that may be read and written: another of its row in the place of -1.

    In a row without any it is the token. So no column is written that is not meant.
    """
    largest = columns.amax(dim=1, keepdim=True)
    other = torch.where(largest < 0, tokens[:, None], largest)
    return torch.where(columns < 0, other, columns)


def log_mass(logprobs: Tensor) -> Tensor:
    """Return log-probabilities, -inf for those below 2^-103 (float32; 2^-970 in float64).

    There sums of exp(d) begin to lose digits, and a derivative over the probability to overflow.
    """
    info = torch.finfo(logprobs.dtype)
    smallest = math.log(info.tiny) - math.log(info.eps)
    return logprobs.masked_fill(logprobs < smallest, -math.inf)


def normalizer_factor(coef: Coefficients) -> Tensor:
    """Return the factor [C] of -p in dL/dz, but for what rest_factor adds."""
    total = coef.logprobs if coef.lse is None else coef.logprobs - coef.lse
    if coef.extra is not None:
        total = total + coef.extra.sum(dim=1)
    return total if coef.rest is None else total + coef.rest


def rest_factor(coef: Coefficients, ids: IdStats | None) -> Tensor:
    """Return dL/dlog r / r, [C]: what is added to the factor of p in columns that are no ids."""
    assert ids is not None
    assert ids.rest is not None
    assert coef.rest is not None
    return coef.rest * torch.where(coef.rest == 0, 0, -ids.rest).exp()
