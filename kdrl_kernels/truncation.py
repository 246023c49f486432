"""Truncates distributions as a sampler's top-k and top-p do, in place and without a sort."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdrl_kernels.plain import check_number
from kdrl_kernels.rows.blocks import block_rows


@dataclass(frozen=True, slots=True)
class Truncation:
    """Says which tokens a sampler keeps in each row; it draws among them, renormalised.

    As in transformers and vLLM, top_k comes first, then top_p of what is left, both after the
    temperature. Of equal logits at a bound all are kept. The token of the row is always kept: it
    was drawn, whatever rounding says. What is kept is a constant: a token left out has gradient 0.

    Args:
        top_k: keep the top_k largest logits; at least 1, or None.
        top_p: keep a token where those more probable than it have less than top_p together, in
            (0, 1]; None: 1.
    Raises: TypeError or ValueError for a number that is none or out of range.
    Memory: a few blocks of rows beside the logits: 1 MB each on a CPU, 32 MB on a GPU.
    Source: top-p, Holtzman et al. 2020, arXiv:1904.09751. Maths: rows/README.md.
    """

    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_number("top_k", self.top_k, optional=True, whole=True)
        check_number("top_p", self.top_p, optional=True)
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] or None, got {self.top_p}")


def truncate_(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, truncation: Truncation | None
) -> Tensor:
    """Set the logits [C, V] that a sampler leaves out to -inf, in blocks of rows; return them.

    tokens [C] are kept. temperature: a number or [C].
    """
    if truncation is None:
        return logits
    C, V = logits.shape
    step = block_rows(V, logits.device)
    for start in range(0, C, step):
        rows = slice(start, start + step)
        part, token = logits[rows], tokens[rows, None]
        token_logits = part.gather(1, token)
        if truncation.top_k is not None and truncation.top_k < V:
            lowest = part.topk(truncation.top_k, dim=1).values[:, -1:]
            part.masked_fill_(part < lowest, -torch.inf)
        if truncation.top_p is not None and truncation.top_p < 1:
            column = temperature[rows, None] if isinstance(temperature, Tensor) else temperature
            p = torch.softmax(part / column, dim=1)
            part.masked_fill_(p < lowest_kept(p, truncation.top_p), -torch.inf)
        part.scatter_(1, token, token_logits)
    return logits


def lowest_kept(p: Tensor, top_p: float) -> Tensor:
    """Return the smallest p of each row [C, 1] above which less than top_p lies, of p [C, V].

    The bits of floats that are not negative are ordered as the floats. So bisection over them ends
    at the exact bound after as many steps as they have bits, each of one sum, and needs neither a
    sort nor its indices.
    """
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[p.dtype]
    high = p.amax(dim=1, keepdim=True).view(bits)  # nothing lies above
    low = torch.full_like(high, -1)
    for _ in range(torch.iinfo(bits).bits - 1):
        middle = low + (high - low + 1) // 2
        above = torch.where(p > middle.view(p.dtype), p, 0).sum(dim=1, keepdim=True)
        enough = above < top_p
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    return high.view(p.dtype)
