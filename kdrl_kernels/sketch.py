"""Replaces dX and dW by sparse products with an unbiased sketch of each row's gradient.

A row of dL/dlogits has V entries, of which few matter. Those at or above a threshold are kept as
they are, the others with a probability, at a value that makes up for it, so that the expected
gradient is the gradient. Maths, variance and when not to use it: rows/SKETCH.md.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdrl_kernels.call import RowSet, take
from kdrl_kernels.plain import check_number
from kdrl_kernels.rows.entries import FORWARD, Grid
from kdrl_kernels.rows.ids import IdStats, normalizer_factor, rest_factor
from kdrl_kernels.token_rows import Coefficients

COLUMNS_PER_ENTRY = {"cpu": 20, "cuda": 192}
"""Columns of a row of both GEMMs that cost what one entry does: its choice and both products."""
FINE, COARSE = 1e-4, 5e-4
"""Default thresholds, of float32 and float64 hidden states and of 16-bit ones."""
LEAST = 2.0**-30
"""No threshold is below: Triton counts whole numbers up to 1 / threshold in 31 bits."""
GOLDEN = -0x61C8864680B583EB
"""2^64 / golden ratio, as a signed integer: what splitmix64 adds for each number."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """Says how backward="sketch" samples the entries of each row's gradient.

    Args:
        threshold: an entry of probability p >= threshold is kept exactly, a smaller one with
            probability p / threshold: at most 1 / threshold + 2 entries a row. 1: a single entry a
            row, beside the sampled token. None: 1e-4, and 5e-4 for 16-bit hidden states, whatever
            the weight's dtype: rounding both to bfloat16 costs a GRPO gradient as much; but at
            least 2 / V, twice the probability of each token where all have the same.
        seed: integer; take another one each step. The same seed gives the same entries, however
            rows are cut into chunks, calls or ranks.
        rows: the number of each row, which with the seed decides its random number: an integer,
            that of the first row of the call, or int64 numbers, [N] or [B, T]. Micro-batches and
            ranks must give different ones, or their errors are the same.
        scale: where the coefficients of a row's gradient are known (not in linear_logprobs) and
            the largest is below scale, its threshold grows as it falls: threshold · scale /
            |coefficient|. 1 fits advantages of standard deviation 1. 0: the same for all rows.
        flat: a row whose entries would cost more than this share of its part of the GEMMs is not
            sketched: its gradient is exact. On a CPU that are rows of more than V · flat / 20
            entries on average, on a GPU V · flat / 192. inf: every row is sketched, as those of
            float16 heads are.
    Raises: ValueError for a number out of range, TypeError for what is no number.
    """

    threshold: float | None = None
    seed: int = 0
    rows: int | Tensor = 0
    scale: float = 1.0
    flat: float = 1.0

    def __post_init__(self) -> None:
        check_number("sketch.threshold", self.threshold, optional=True)
        if self.threshold is not None and not 2.0**-24 <= self.threshold <= 1:  # float32's 24 bits
            raise ValueError(f"sketch.threshold must be in [2^-24, 1], got {self.threshold}")
        check_number("sketch.seed", self.seed, whole=True)
        check_number("sketch.scale", self.scale)
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"sketch.scale must be finite and not negative, got {self.scale}")
        check_number("sketch.flat", self.flat)
        if not self.flat >= 0:
            raise ValueError(f"sketch.flat must not be negative, got {self.flat}")
        if not isinstance(self.rows, Tensor):
            check_number("sketch.rows", self.rows, whole=True)
        elif self.rows.dtype != torch.int64:
            raise TypeError(f"sketch.rows must be int64, got {self.rows.dtype}")

    def of_head(self, hidden: Tensor, V: int) -> "Sketch":
        """Return this sketch with a threshold, and the number of each row of hidden, [N].

        Raises: ValueError where rows has another size or device.
        """
        N, device, threshold = len(hidden), hidden.device, self.threshold
        if threshold is None:
            threshold = default_threshold(hidden.dtype, V)
        if not isinstance(self.rows, Tensor):
            rows = torch.arange(N, device=device) + self.rows
            return replace(self, rows=rows, threshold=threshold)
        if self.rows.numel() != N or self.rows.device != device:
            raise ValueError(
                f"sketch.rows must hold {N} numbers on {device}, one a row, got "
                f"{list(self.rows.shape)} on {self.rows.device}"
            )
        return replace(self, rows=self.rows.flatten(), threshold=threshold)

    def select(self, rows: RowSet) -> "Sketch":
        """Return this sketch of some rows; its rows is [N] here."""
        assert isinstance(self.rows, Tensor)
        return replace(self, rows=take(self.rows, rows))

    def grid(
        self,
        rows: RowSet,
        V: int,
        coef: Coefficients | None,
        ids: IdStats | None = None,
        kd: str | None = None,
    ) -> Grid:
        """Return thresholds and random numbers of some rows of a call; rows is [N] here.

        coef: derivatives of these rows; None where they are not known yet.
        ids: what the loss reads beside the token. No id is sampled; thresholds are for the other
            columns, and finer where the loss reads log r, r their probability.
        kd: the divergence whose gradient is sketched, if any.
        """
        assert isinstance(self.rows, Tensor)
        assert self.threshold is not None
        uniforms = uniform(self.seed, take(self.rows, rows))
        thresholds = torch.full_like(uniforms, self.threshold)
        most_entries = self.flat * V / COLUMNS_PER_ENTRY.get(uniforms.device.type, 20)
        if coef is not None:
            largest = coef.sizes().double()
            thresholds *= (self.scale / largest).clamp(min=1)  # NaN stays NaN
            thresholds.masked_fill_(largest == 0, math.inf)
        if ids is not None and ids.rest is not None and (coef is None or coef.rest is not None):
            share = _share_of_rest(ids, coef)
            if kd in FORWARD:  # of (p + q) / 2 these columns may hold half, however small r is
                share = torch.maximum(share, (1 + ids.rest.double().exp()) / 2)
            thresholds = (thresholds * share).clamp(min=LEAST)
        return Grid(thresholds, uniforms, self.threshold, most_entries)


def _share_of_rest(ids: IdStats, coef: Coefficients | None) -> Tensor:
    """Return what thresholds are multiplied with where log r is read, [C] in float64.

    dL/dlog r / r may be large where r is small. r: as many entries are kept as of a whole row. That
    is too many where the factor f of p in these columns is no larger than the derivatives are.
    """
    assert ids.rest is not None
    if coef is None or coef.rest is None:
        return torch.where(ids.rest > -math.inf, ids.rest, 0).double().exp()
    factor = (normalizer_factor(coef) - rest_factor(coef, ids)).abs()
    share = torch.maximum(ids.rest.exp(), (coef.sizes() / factor).clamp(max=1))
    return torch.where(coef.rest == 0, 1, share).double()


def default_threshold(dtype: torch.dtype, V: int) -> float:
    """Return the threshold of hidden states of a dtype and V columns where none is set."""
    return min(1.0, max(COARSE if dtype.itemsize == 2 else FINE, 2 / V))


def uniform(seed: int, rows: Tensor) -> Tensor:
    """Return a random number in [0, 1) for each row number, float64: splitmix64 of both."""
    state = _mix(torch.full_like(rows, _signed(seed)) + GOLDEN)
    return (_mix(state + rows * GOLDEN) >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    """Return the output function of splitmix64 (Steele, Lea, Flood 2014) of int64 states."""
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned numbers."""
    return z >> bits & (1 << 64 - bits) - 1


def _signed(number: int) -> int:
    """Return the signed 64-bit integer with the low 64 bits of a number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
