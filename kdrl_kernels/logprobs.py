"""Computes log-probabilities and entropies for a loss that is not known yet.

Forward keeps two numbers a row, and backward projects each chunk again (4u in all, u = 2 N H V
FLOP), except the first chunks, whose logits may be kept (3u for those).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels.buffers import Buffers, gradient_view
from kdrl_kernels.call import LogprobCall, take
from kdrl_kernels.checks import bad_tokens, check_head_values, poison
from kdrl_kernels.gradients import Gradients
from kdrl_kernels.head import in_one_dtype
from kdrl_kernels.plan import accumulator, balanced, chunks_of, padded
from kdrl_kernels.rows.streams import Stats, Stream
from kdrl_kernels.token_rows import Coefficients
from kdrl_kernels.truncation import truncate_


@dataclass(frozen=True, slots=True)
class Scores:
    """Holds what the forward pass leaves: [N] each, and the logits of the first rows."""

    logprobs: Tensor
    max: Tensor
    log_sum: Tensor
    entropy: Tensor | None
    cache: Tensor
    """[rows, width], logits as the sweep left them; 0 rows where none are kept."""


@dataclass(frozen=True, slots=True)
class BackwardCall:
    """Holds what the backward pass reads."""

    forward: LogprobCall
    scores: Scores
    grad_logprobs: Tensor
    """[N], the gradient of a later loss to the log-probabilities."""
    grad_entropy: Tensor | None
    """[N], the gradient of a later loss to the entropies."""


def cached_rows(
    N: int, V: int, dtype: torch.dtype, max_rows: int, cache_bytes: int, mask_rows: int | None
) -> int:
    """Return how many rows, in whole chunks, have logits that fit into cache_bytes.

    mask_rows: size of the mask that chose the N rows, None without one. A graph knows this number,
    but no N to compare: where less than mask_rows fit, it keeps none.
    """
    fit = int(cache_bytes // (padded(V) * accumulator(dtype).itemsize))
    if fit > 0 and mask_rows is not None and torch.compiler.is_compiling():
        return N if fit >= mask_rows else 0
    if fit == 0:
        return 0
    size = balanced(N, max_rows)
    return N if fit >= N else fit // size * size


def score(call: LogprobCall, collector: Any = None) -> Scores:
    """Run the forward pass; keep the logits of the first call.cached rows.

    collector: takes the logits of each chunk once they are swept; None: nobody.
    """
    head, V, N = in_one_dtype(call.head), len(call.head.weight), len(call.tokens)
    check_head_values(head)
    bad = bad_tokens(call.tokens, V, "V")
    tokens = call.tokens.clamp(0, V - 1)  # reads stay inside
    size = balanced(N, call.max_rows)
    cache = head.hidden.new_empty(call.cached, padded(V), dtype=accumulator(head.hidden.dtype))
    masses = collector is not None
    buffers = Buffers(head, V, size if call.cached < N else 0, 1, call.impl, masses)
    chunks = []
    for rows in chunks_of(N, size):
        kept = cache[rows, :V] if rows.stop <= call.cached else None
        stream = buffers.project(head, rows, out=kept)
        truncate_(stream.logits, tokens[rows], stream.temperature, call.truncation)
        chunks.append(buffers.work.sweep(stream, tokens[rows], entropy=call.entropy))
        if collector is not None:
            collector.take_scores(call.impl, stream, tokens[rows], chunks[-1], rows)
    return Scores(
        poison(torch.cat([stats.logprobs for stats in chunks]), bad),
        torch.cat([stats.max for stats in chunks]),
        torch.cat([stats.log_sum for stats in chunks]),
        torch.cat([stats.entropy for stats in chunks]) if call.entropy else None,
        cache,
    )


def gradients(backward: BackwardCall, total: Gradients | None = None) -> tuple[Gradients, Tensor]:
    """Return gradients and a 0-d scale: their product is the gradient of the later loss.

    total: what they are added to; None: new ones.
    """
    call, scores, grad_logprobs = backward.forward, backward.scores, backward.grad_logprobs
    head, V, N = in_one_dtype(call.head), len(call.head.weight), len(call.tokens)
    size = balanced(N, call.max_rows)
    buffers = Buffers(head, V, size, 1, call.impl)
    total = total or Gradients(head, call.needs)
    bad = bad_tokens(call.tokens, V, "V")
    tokens = call.tokens.clamp(0, V - 1)
    for rows in chunks_of(N, size):
        entropy, grad_entropy = None, None
        if backward.grad_entropy is not None and scores.entropy is not None:
            entropy, grad_entropy = scores.entropy[rows], backward.grad_entropy[rows]
        stats = Stats(scores.max[rows], scores.log_sum[rows], scores.logprobs[rows], entropy)
        buffer = buffers.streams[0][: rows.stop - rows.start]
        if rows.stop <= len(scores.cache):
            temperature = head.temperature
            if isinstance(temperature, Tensor):
                temperature = take(temperature, rows)
            stream = Stream(scores.cache[rows, :V], temperature, head.softcap)
        else:
            stream = buffers.project(head, rows)
            truncate_(stream.logits, tokens[rows], stream.temperature, call.truncation)
            buffers.work.resume_(stream, stats)
        coef = total.in_unit(Coefficients(grad_logprobs[rows], grad_entropy))
        out = gradient_view(buffer, head.hidden.dtype)
        dz = buffers.work.gradient(stream, tokens[rows], stats, coef, out=out)
        total.add(head, rows, dz)
    return total, total.finish_(poison(grad_logprobs.new_ones(()), bad), head.hidden.dtype)
