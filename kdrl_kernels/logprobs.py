"""linear_logprobs: log-probability and entropy for a loss that is not known yet.

Forward keeps two numbers a row; backward projects each chunk again (4u in all, u = 2NHV FLOP),
but for the first chunks, whose logits may be kept (3u for those).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdrl_kernels.call import take
from kdrl_kernels.checks import bad_tokens, check_head_values, poison
from kdrl_kernels.head import Head
from kdrl_kernels.objective import Coefficients
from kdrl_kernels.one_pass import Buffers, Gradients, Needs, gradient_view
from kdrl_kernels.plan import accumulator, balanced, chunks_of, padded
from kdrl_kernels.rows import Stats, Stream


@dataclass(frozen=True, slots=True)
class Scores:
    """What the forward pass leaves: [N] each, and the logits of the first rows."""

    logprobs: Tensor
    max: Tensor
    log_sum: Tensor
    entropy: Tensor | None
    cache: Tensor
    """[rows, width], as the sweep left them; 0 rows where nothing is kept."""


def cached_rows(N: int, V: int, dtype: torch.dtype, max_rows: int, cache_bytes: int) -> int:
    """Rows of whole chunks whose logits fit into cache_bytes."""
    size = balanced(N, max_rows)
    fit = cache_bytes // (padded(V) * accumulator(dtype).itemsize)
    return N if fit >= N else fit // size * size


def score(
    head: Head, tokens: Tensor, *, entropy: bool, impl: str, max_rows: int, cached: int
) -> Scores:
    """The forward pass; logits of the first `cached` rows stay."""
    V, N = len(head.weight), len(tokens)
    check_head_values(head)
    bad = bad_tokens(tokens, V, "V")
    tokens = tokens.clamp(0, V - 1)  # reads stay inside
    size = balanced(N, max_rows)
    cache = head.hidden.new_empty(cached, padded(V), dtype=accumulator(head.hidden.dtype))
    buffers = Buffers(head, V, size if cached < N else 0, 1, impl)
    found = []
    for rows in chunks_of(N, size):
        kept = cache[rows, :V] if rows.stop <= cached else None
        stream = buffers.project(head, rows, out=kept)
        found.append(buffers.work.sweep(stream, tokens[rows], entropy=entropy))
    return Scores(
        poison(torch.cat([stats.logprobs for stats in found]), bad),
        torch.cat([stats.max for stats in found]),
        torch.cat([stats.log_sum for stats in found]),
        torch.cat([stats.entropy for stats in found]) if entropy else None,
        cache,
    )


def gradients(
    head: Head,
    tokens: Tensor,
    scores: Scores,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    *,
    impl: str,
    max_rows: int,
    needs: Needs,
) -> tuple[Gradients, Tensor]:
    """(gradients, 0-d scale), whose product is the true one, of upstream gradients [N]."""
    V, N = len(head.weight), len(tokens)
    size = balanced(N, max_rows)
    buffers = Buffers(head, V, size, 1, impl)
    found = Gradients(head, needs)
    bad = bad_tokens(tokens, V, "V")
    tokens = tokens.clamp(0, V - 1)
    for rows in chunks_of(N, size):
        entropy = None if scores.entropy is None else scores.entropy[rows]
        stats = Stats(scores.max[rows], scores.log_sum[rows], scores.logprobs[rows], entropy)
        buffer = buffers.streams[0][: rows.stop - rows.start]
        if rows.stop <= len(scores.cache):
            temperature = head.temperature
            if isinstance(temperature, Tensor):
                temperature = take(temperature, rows)
            stream = Stream(scores.cache[rows, :V], temperature, head.softcap)
        else:
            stream = buffers.project(head, rows)
            buffers.work.resume_(stream, stats)
        upstream = Coefficients(
            grad_logprobs[rows], None if grad_entropy is None else grad_entropy[rows]
        )
        coef = found.in_unit(upstream)
        out = gradient_view(buffer, head.hidden.dtype)
        dz = buffers.work.gradient(stream, tokens[rows], stats, coef, out=out)
        found.add(head, rows, dz)
    return found, found.finish_(poison(grad_logprobs.new_ones(()), bad), head.hidden.dtype)
