"""Computes log-probabilities and entropies for a loss that is not known yet.

Forward keeps two numbers a row, and backward projects each chunk again (4u in all, u = 2 N H V
FLOP), except the first chunks, whose logits may be kept (3u for those).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels.buffers import Buffers, gradient_view, stream_of
from kdrl_kernels.call import LogprobCall
from kdrl_kernels.checks import bad_ids, bad_tokens, check_head_values, poison
from kdrl_kernels.chunks import accumulator, balanced, chunks_of, held_rows, padded
from kdrl_kernels.gradients import Gradients, writes_at_once
from kdrl_kernels.head import Head, in_one_dtype
from kdrl_kernels.rows.best_columns import best_columns
from kdrl_kernels.rows.ids import IdStats
from kdrl_kernels.rows.streams import Stats
from kdrl_kernels.token_rows import Coefficients
from kdrl_kernels.truncation import truncate_
from kdrl_kernels.vocab_shard import VocabShard


@dataclass(frozen=True, slots=True)
class Scores:
    """Holds what the forward pass leaves: [N] each, and the logits of the first rows."""

    logprobs: Tensor
    max: Tensor
    log_sum: Tensor
    entropy: Tensor | None
    extra_logprobs: Tensor | None
    """[N, K]."""
    rest_logprob: Tensor | None
    cache: Tensor
    """[rows, width], logits as the sweep left them; 0 rows where none are kept."""
    topk_tokens: Tensor | None = None
    """[N, K] int64, the ids of extra_logprobs where call.topk chose them."""


OF_ROWS = ("logprobs", "max", "log_sum", "entropy", "extra_logprobs", "rest_logprob", "topk_tokens")
"""The fields of Scores that hold a value or more of each row."""


@dataclass(frozen=True, slots=True)
class BackwardCall:
    """Holds what the backward pass reads."""

    forward: LogprobCall
    scores: Scores
    grad_logprobs: Tensor
    """[N], the gradient of a later loss to the log-probabilities."""
    grad_entropy: Tensor | None
    """[N], the gradient of a later loss to the entropies."""
    grad_extra: Tensor | None = None
    """[N, K], the gradient of a later loss to the log-probabilities at extra_tokens."""
    grad_rest: Tensor | None = None
    """[N], that to the log-probability of the rest."""

    def at_ids(self, columns: Tensor | None, rows: slice) -> IdStats | None:
        """Return what the sweep of some rows computed at their ids, if a gradient needs it."""
        if self.grad_extra is None and self.grad_rest is None:
            return None
        extra, rest = self.scores.extra_logprobs, self.scores.rest_logprob
        assert columns is not None
        assert extra is not None
        rest = None if rest is None or not self.forward.rest else rest[rows]
        return IdStats(columns[rows], extra[rows], rest=rest)

    def select(self, rows: Tensor) -> "BackwardCall":
        """Return the backward pass of some rows, none of which kept its logits."""
        call, scores = self.forward, self.scores

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        numbers: dict[str, Any] = {name: cut(getattr(scores, name)) for name in OF_ROWS}
        return BackwardCall(
            replace(
                call,
                head=call.head.select(rows),
                tokens=call.tokens[rows],
                extra_tokens=cut(call.extra_tokens),
            ),
            replace(scores, **numbers),
            self.grad_logprobs[rows],
            *(cut(grad) for grad in (self.grad_entropy, self.grad_extra, self.grad_rest)),
        )

    def coefficients(self, rows: slice, at_ids: IdStats | None) -> Coefficients:
        """Return the derivatives of the later loss of some rows."""
        grads = self.grad_entropy, None, None, None, self.grad_extra, self.grad_rest
        parts = (None if grad is None else grad[rows] for grad in grads)
        coef = Coefficients(self.grad_logprobs[rows], *parts)
        return coef if at_ids is None else at_ids.live(coef)


def cached_rows(
    N: int,
    head: Head,
    max_rows: int,
    cache_bytes: int,
    mask_rows: int | None,
) -> int:
    """Return how many rows, in whole chunks, have logits that fit into cache_bytes.

    mask_rows: size of the mask that chose the N rows, None without one. A graph knows this number,
    but no N to compare: where less than mask_rows fit, it keeps none.
    """
    hidden, V = head.hidden, len(head.weight)
    fit = int(cache_bytes // (padded(V) * accumulator(hidden.dtype).itemsize))
    if fit > 0 and mask_rows is not None and torch.compiler.is_compiling():
        return N if fit >= mask_rows else 0
    if fit == 0:
        return 0
    size = balanced(N, max_rows, hidden.device)
    return N if fit >= N else fit // size * size


def score(call: LogprobCall, collector: Any = None, shard: VocabShard | None = None) -> Scores:
    """Run the forward pass; keep the logits of the first call.cached rows.

    collector: takes the logits of each chunk once they are swept; None: nobody.
    shard: the columns that this rank holds; None: all.
    """
    head, V, N = in_one_dtype(call.head), len(call.head.weight), len(call.tokens)
    check_head_values(head)
    bad, tokens, ids = _inside(call, V if shard is None else shard.vocab_size)
    size = balanced(N, call.max_rows, head.hidden.device)
    held = held_rows(size, call.max_rows, head.hidden.device)
    cache = head.hidden.new_empty(call.cached, padded(V), dtype=accumulator(head.hidden.dtype))
    masses = collector is not None
    buffers = Buffers(head, V, held if call.cached < N else 0, 1, call.impl, masses, shard)
    chunks, best = [], list[Tensor]()
    for rows in chunks_of(N, size):
        kept = cache[rows, :V] if rows.stop <= call.cached else None
        stream = buffers.project(head, rows, out=kept)
        truncate_(stream.logits, tokens[rows], stream.temperature, call.truncation)
        if call.topk:
            best_of = best_columns if shard is None else shard.best_columns
            best.append(best_of(stream.logits, call.topk))
        options = {}
        if call.has_ids:
            options = {"ids": best[-1] if ids is None else ids[rows], "rest": call.rest}
        chunks.append(buffers.work.sweep(stream, tokens[rows], entropy=call.entropy, **options))
        if collector is not None:
            collector.take_scores(call.impl, stream, tokens[rows], chunks[-1], rows)
    at_ids = [stats.at_ids for stats in chunks if stats.at_ids is not None]
    extra = torch.cat([ids.logprobs for ids in at_ids]) if at_ids else None
    rest = [ids.rest for ids in at_ids if ids.rest is not None]
    return Scores(
        poison(torch.cat([stats.logprobs for stats in chunks]), bad),
        torch.cat([stats.max for stats in chunks]),
        torch.cat([stats.log_sum for stats in chunks]),
        torch.cat([stats.entropy for stats in chunks]) if call.entropy else None,
        extra if extra is None else poison(extra, bad),
        poison(torch.cat(rest), bad) if rest else None,
        cache,
        torch.cat(best) if best else None,
    )


def _inside(call: LogprobCall, V: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return how many tokens and ids are out of range, 0-d, and both so that reads stay inside."""
    ids = call.extra_tokens
    bad = bad_tokens(call.tokens, V, "V") + bad_ids(ids, V, "V")
    return bad, call.tokens.clamp(0, V - 1), None if ids is None else ids.clamp(-1, V - 1)


def gradients(
    backward: BackwardCall, total: Gradients | None = None, shard: VocabShard | None = None
) -> tuple[Gradients, Tensor]:
    """Return gradients and a 0-d scale: their product is the gradient of the later loss.

    total: what they are added to; None: new ones. shard: as in score.
    """
    call, scores, grad_logprobs = backward.forward, backward.scores, backward.grad_logprobs
    head, V, N = in_one_dtype(call.head), len(call.head.weight), len(call.tokens)
    size = balanced(N, call.max_rows, head.hidden.device)
    held = held_rows(size, call.max_rows, head.hidden.device)
    buffers = Buffers(head, V, held, 1, call.impl, shard=shard)
    total = total or Gradients(
        head, call.needs, shard=shard, impl=call.impl, direct=writes_at_once(call.head, size >= N)
    )
    bad, tokens, ids = _inside(call, V if shard is None else shard.vocab_size)
    for rows in chunks_of(N, size):
        entropy, at_ids = None, backward.at_ids(ids, rows)
        if backward.grad_entropy is not None and scores.entropy is not None:
            entropy = scores.entropy[rows]
        numbers = scores.max[rows], scores.log_sum[rows], scores.logprobs[rows], entropy
        stats = Stats(*numbers, at_ids=at_ids)
        buffer = buffers.streams[0][: rows.stop - rows.start]
        if rows.stop <= len(scores.cache):
            stream = stream_of(head, rows, scores.cache[rows, :V])
        else:
            stream = buffers.project(head, rows)
            truncate_(stream.logits, tokens[rows], stream.temperature, call.truncation)
            buffers.work.resume_(stream, stats)
        coef = backward.coefficients(rows, at_ids)
        coef = total.in_unit(coef, stats, stream.temperature)
        out = gradient_view(buffer, head.hidden.dtype)
        dz = buffers.work.gradient(stream, tokens[rows], stats, coef, out=out)
        total.add(head, rows, dz)
    return total, total.finish_(poison(grad_logprobs.new_ones(()), bad), head.hidden.dtype)
