"""Runs losses and log-probabilities whose backward pass multiplies a sketch of dL/dlogits.

Between the two passes there are row lists, in place of a dense dX and dW. For log-probabilities
the sketch is that of p, which does not depend on the loss: backward then needs no logits at all.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrl_kernels import flat_rows, logprobs, one_pass
from kdrl_kernels import rows as row_work
from kdrl_kernels.autocast import without_autocast
from kdrl_kernels.call import LogprobCall, LossCall, RowOutputs, RowSet, take
from kdrl_kernels.checks import bad_ids, bad_tokens, poison
from kdrl_kernels.chunks import accumulator
from kdrl_kernels.flat_rows import FlatRows
from kdrl_kernels.gradients import Chunk, Gradients
from kdrl_kernels.head import Needs, StudentHead, Sums, gradient_dtypes, in_one_dtype
from kdrl_kernels.rows.entries import Entries
from kdrl_kernels.rows.ids import normalizer_factor, rest_factor
from kdrl_kernels.rows.streams import Stats, Stream
from kdrl_kernels.scaling import scaled_
from kdrl_kernels.sketch import Sketch
from kdrl_kernels.sketched_ids import add_at, at_tokens, places, with_ids, without_hits
from kdrl_kernels.sparse_rows import SparseRows, row_of_each, row_sums
from kdrl_kernels.token_rows import Coefficients


class Lists:
    """Collects the entries of all chunks of a pass, in place of one_pass.Gradients."""

    masses = True

    def __init__(self, sketch: Sketch) -> None:
        self.sketch = sketch
        self.counts: list[Tensor] = []
        self.parts: list[tuple[Tensor, ...]] = []
        self.squares: list[Tensor] = []
        self.flat = FlatRows()
        self.flat_indices: list[Tensor] = []
        """The indices of the flat rows of each chunk."""
        self.places: list[Tensor] = []
        """The entry of each id, [C, K] of each chunk, in the list of all; -1: none."""

    def take(self, call: LossCall, chunk: Chunk) -> Tensor:
        """Sketch the gradient of a chunk; return the number of rows that have one, 0-d."""
        rows, student, stats, coef = chunk.rows, chunk.student, chunk.stats, chunk.coef
        V = call.vocab_size
        ids = stats.at_ids if coef.reads_ids else None  # kdrl_loss may return ids that it ignores
        teacher = None if coef.kl is None else chunk.teacher
        grid = self.sketch.grid(rows, V, coef, ids, None if teacher is None else teacher.kd)
        work, used_or_flat = row_work.load_sketch(call.impl), coef.used()
        entries, flat = work.sketch(student, stats, coef, grid, teacher)
        used = used_or_flat & ~flat
        if ids is not None:
            entries = with_ids(entries, ids, used, without_hits(stats, coef, teacher), V)
        n = used.nonzero().squeeze(1)
        merged, offsets = with_tokens(entries, take(call.tokens, rows), stats, n)
        first = offsets[n]
        if ids is not None and coef.extra is not None:
            add_at(merged.value, places(merged, ids, used, V), coef.extra)
            merged.value[first] = 0  # a token may be an id; its entry is what the others leave
        # 0 · log_sum: a row that is not finite has no entries, and must not pass for one
        total = 0 * (stats.log_sum + coef.logprobs) if coef.lse is None else coef.lse
        if ids is None and coef.kl is not None:  # without one, kept entries sum to 1 within t
            merged.value[first] = at_tokens(stats, coef, teacher)[n]
            balance_(merged, total - row_sums(merged.value, offsets), offsets)
        else:
            merged.value[first] = (total - row_sums(merged.value, offsets))[n]
        slope = slopes(student, stats, merged)
        values = merged.value if slope is None else merged.value * slope
        squares = values.double().square()
        exact = squares * merged.chance
        self.squares.append(torch.stack([(squares - exact).sum(), exact.sum()]))
        self.counts.append(offsets.diff())
        self.parts.append((merged.column.int(), values))
        self.flat_indices.append(indices(rows, flat))
        if len(self.flat_indices[-1]):
            self.flat.take(call, replace(chunk, coef=coef.of_rows(flat)))
        return used_or_flat.sum()

    def take_scores(
        self, impl: str, student: Stream, tokens: Tensor, stats: Stats, rows: RowSet
    ) -> None:
        """Sketch p of a chunk, for a loss that is not known yet."""
        V, ids = student.logits.shape[1], stats.at_ids
        grid = self.sketch.grid(rows, V, None, ids)
        coef = Coefficients(torch.full_like(stats.logprobs, -1))  # dL/dz = p
        entries, flat = row_work.load_sketch(impl).sketch(student, stats, coef, grid)
        if ids is not None:
            entries = with_ids(entries, ids, ~flat, ids.logprobs.exp(), V)
        merged, offsets = with_tokens(entries, tokens, stats, (~flat).nonzero().squeeze(1))
        if ids is not None:
            place = places(merged, ids, ~flat, V)
            before = sum(len(columns) for columns, *_ in self.parts)
            self.places.append(torch.where(place < 0, -1, place + before))
        self.flat_indices.append(indices(rows, flat))
        self.counts.append(offsets.diff())
        values = merged.value, merged.logp, slopes(student, stats, merged)
        self.parts.append((merged.column.int(), *(x for x in values if x is not None)))

    def finish_(self, scale: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """Return the scale: the entries are multiplied with it in backward."""
        return scale

    def joined(self, active: RowSet, N: int) -> tuple[Tensor, ...]:
        """Return the offsets of N rows, then what each chunk gave, which came in active's order."""
        counts = torch.cat(self.counts)
        if isinstance(active, Tensor):
            counts = counts.new_zeros(N).index_copy(0, active, counts)
        parts = (torch.cat(values) for values in zip(*self.parts, strict=True))
        return F.pad(counts.cumsum(0), (1, 0)), *parts

    def metrics(self) -> dict[str, Tensor]:
        """Return the number of entries, and the relative error to expect of dX."""
        entries = torch.cat(self.counts).sum()
        noise, signal = torch.stack(self.squares).sum(dim=0)
        signal = signal + self.flat.squares
        return {
            "entries": entries,
            "flat_rows": entries.new_full((), sum(map(len, self.flat_indices))),
            "sketch_variance_sum": noise,
            "sketch_square_sum": signal,
            "sketch_noise": (noise / signal).sqrt(),
        }


def indices(rows: RowSet, where: Tensor) -> Tensor:
    """Return the indices in the call of a chunk's rows where a [C] bool is true."""
    place = where.nonzero().squeeze(1)
    return place + rows.start if isinstance(rows, slice) else rows[place]


def with_tokens(
    entries: Entries, tokens: Tensor, stats: Stats, n: Tensor
) -> tuple[Entries, Tensor]:
    """Put the sampled token in front of the entries of each used row n, with value 0 and chance 1.

    Its own entry, where it was kept, goes. Returns the entries and their offsets, [C + 1].
    """
    others = (entries.column != tokens[entries.row]).nonzero().squeeze(1)
    row, order = torch.cat([n, entries.row[others]]).sort(stable=True)
    place = torch.cat([torch.arange(len(n), device=row.device), others + len(n)])[order]
    ones = torch.ones_like(stats.logprobs[n])
    merged = Entries(
        row,
        torch.cat([tokens[n], entries.column])[place],
        torch.cat([ones, entries.chance])[place],
        torch.cat([0 * ones, entries.value])[place],
        torch.cat([stats.logprobs[n], entries.logp])[place],
    )
    offsets = torch.searchsorted(row, torch.arange(len(tokens) + 1, device=row.device))
    return merged, offsets


def balance_(entries: Entries, missing: Tensor, offsets: Tensor) -> None:
    """Spread what the sum of each row lacks, [C], evenly over its entries of chance 1.

    Which entries these are is no matter of chance, so the mean stays right.
    """
    certain = entries.chance == 1
    counts = row_sums(certain.to(missing.dtype), offsets)
    entries.value.add_(torch.where(certain, (missing / counts)[entries.row], 0))


def slopes(stream: Stream, stats: Stats, entries: Entries) -> Tensor | None:
    """Return dz/dlogits of each entry; None where it is 1."""
    temperature, softcap, row = stream.temperature, stream.softcap, entries.row
    if isinstance(temperature, Tensor):
        temperature = temperature.to(entries.logp.dtype)[row]
    if softcap is None:
        if isinstance(temperature, Tensor) or temperature != 1:
            return 1 / (temperature * torch.ones_like(entries.logp))
        return None
    a = (entries.logp + stats.log_sum[row]) * temperature + stats.max[row]
    return (1 - (a / softcap).square()) / temperature


class _Loss(torch.autograd.Function):
    """Computes a loss of hidden, weight and bias; backward multiplies the sketch of its rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: LossCall,
        lists: Lists,
        passes: list[one_pass.Pass],
    ) -> Tensor:
        with without_autocast(hidden.device):
            result = one_pass.run(call, lists)
            passes.append(result)
            ctx.settings = call.needs, call.impl
            if lists.parts:
                tensors = *lists.joined(result.active, len(call.tokens)), *lists.flat.tensors()
                head = hidden, weight, bias, call.student.constant
                ctx.save_for_backward(*head, result.scale, *tensors)
        return result.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, constant, scale, *lists = ctx.saved_tensors
        offsets, columns, values, rows, dz, *total = lists
        head = StudentHead(hidden, weight, bias, constant=constant)
        (needs, impl), scale = ctx.settings, scale * grad_loss
        if dz is None and all(x is None for x in total):
            sparse = SparseRows(offsets, columns, values * scale)
            return *products(sparse, head, needs, impl), None, None, None
        wide = accumulator(hidden.dtype)
        with torch.no_grad(), without_autocast(hidden.device):
            # sums of 16-bit operands are scaled when they are rounded, others at once
            at_once = scale if hidden.dtype == wide else torch.ones_like(scale)
            sparse, same = SparseRows(offsets, columns, values * at_once), in_one_dtype(head)
            if dz is None:
                sums = scaled_copies(total, at_once)
                sparse.add_to(sums, same, impl)
            else:
                sums = sparse.products(same, [wide] * 3, needs, impl)
                flat_rows.add_to(sums, same, rows, dz, at_once)
            if hidden.dtype != wide:
                sums = rounded(sums, head, scale)
        return *once(sums, head), None, None, None


def scaled_copies(sums: list[Tensor | None], scale: Tensor) -> Sums:
    """Return sums · scale: the tensors themselves where no second backward pass reads them."""
    again = torch._C._autograd._get_current_graph_task_keep_graph()
    dx, dw, db = (x if x is None else x * scale if again else x.mul_(scale) for x in sums)
    return dx, dw, db


def rounded(sums: Sums, head: StudentHead, scale: Tensor) -> Sums:
    """Return sums · scale, each rounded once to its dtype."""
    pairs = zip(sums, gradient_dtypes(head), strict=True)
    dx, dw, db = (x if x is None else scaled_(x, scale, dtype) for x, dtype in pairs)
    return dx, dw, db


class _Once(torch.autograd.Function):
    """Passes a gradient on, and raises where it is to be differentiated."""

    @staticmethod
    def forward(_ctx: Any, gradient: Tensor, leaf: Tensor) -> Tensor:  # noqa: ARG004 (the graph)
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_ctx: Any, *_: Tensor) -> tuple[None, None]:
        raise RuntimeError('backward="sketch" is differentiable once, got a second derivative')


def products(sparse: SparseRows, head: StudentHead, needs: Needs, impl: str) -> Sums:
    """Return the gradients of hidden, weight and bias, each in its own dtype."""
    with torch.no_grad(), without_autocast(head.hidden.device):
        results = sparse.products(in_one_dtype(head), gradient_dtypes(head), needs, impl)
    return once(results, head)


def once(results: Sums, head: StudentHead) -> Sums:
    """Return gradients that raise where they are to be differentiated, with create_graph=True."""
    if not torch.is_grad_enabled():
        return results
    pairs = zip(results, (head.hidden, head.weight, head.bias), strict=True)
    dx, dw, db = (None if x is None or leaf is None else _Once.apply(x, leaf) for x, leaf in pairs)
    return dx, dw, db


@torch.compiler.disable(reason="the number of entries of a sketch depends on the values")
def loss(call: LossCall, sketch: Sketch) -> tuple[Tensor, RowOutputs, Tensor, dict[str, Tensor]]:
    """Return the 0-d loss, differentiable once; row outputs; counts; metrics of the sketch."""
    student, lists, passes = call.student, Lists(sketch), list[one_pass.Pass]()
    value = _Loss.apply(student.hidden, student.weight, student.bias, call, lists, passes)
    (result,) = passes
    return value, result.rows, result.counts, lists.metrics() if lists.parts else {}


class _Logprobs(torch.autograd.Function):
    """Computes log-probabilities and entropies; backward needs the sketch of p alone."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: LogprobCall,
        sketch: Sketch,
    ) -> tuple[Tensor | None, ...]:
        lists, V = Lists(sketch), len(call.head.weight)
        with without_autocast(hidden.device):
            scores = logprobs.score(call, lists)
            tensors = lists.joined(slice(None), len(call.tokens))
            bad = bad_tokens(call.tokens, V, "V") + bad_ids(call.extra_tokens, V, "V")
            log_sum = poison(scores.log_sum, bad)
        ctx.constants = call.head.temperature, call.head.softcap, call.truncation
        ctx.settings = call.needs, call.impl, call.max_rows, call.entropy, call.rest
        ids = call.extra_tokens if scores.topk_tokens is None else scores.topk_tokens
        place = torch.cat(lists.places) if lists.places else None
        stats = scores.logprobs, scores.max, log_sum, scores.entropy
        at_ids = scores.extra_logprobs, scores.rest_logprob
        rows = call.tokens, torch.cat(lists.flat_indices), ids, place
        head = hidden, weight, bias, call.head.constant
        ctx.save_for_backward(*head, *rows, *stats, *at_ids, *tensors)
        ctx.set_materialize_grads(False)
        if scores.topk_tokens is not None:
            ctx.mark_non_differentiable(scores.topk_tokens)
        return scores.logprobs, scores.entropy, *at_ids, scores.topk_tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
        others = grads[:3]  # of entropy, extra_logprobs and rest_logprob
        if grad is None and all(other is None for other in others):
            return (None,) * 5
        hidden, weight, bias, constant, tokens, flat, ids, place, *tensors = ctx.saved_tensors
        lp, top, log_sum, entropy, extra, rest, offsets, columns, p, logp, *slope = tensors
        temperature, softcap, truncation = ctx.constants
        head = StudentHead(hidden, weight, bias, temperature, softcap, constant)
        needs, impl, max_rows, *wants = ctx.settings
        options = impl, max_rows, 0, needs, truncation, ids, wants[1]
        call, cache = LogprobCall(head, tokens, wants[0], *options), hidden.new_empty(0, 0)
        scores = logprobs.Scores(lp, top, log_sum, entropy, extra, rest, cache)
        grad = torch.zeros_like(log_sum) if grad is None else grad
        backward = logprobs.BackwardCall(call, scores, grad, *others)
        values = entry_values(backward, offsets, p, logp, place)
        sparse = SparseRows(offsets, columns, values * slope[0] if slope else values)
        if len(flat) == 0:
            return *products(sparse, head, needs, impl), None, None
        with torch.no_grad(), without_autocast(hidden.device):
            sums = with_exact_rows(sparse, head, backward.select(flat), flat)
        return *once(sums, head), None, None


def entry_values(
    backward: logprobs.BackwardCall, offsets: Tensor, p: Tensor, logp: Tensor, place: Tensor | None
) -> Tensor:
    """Return dL/dz of all entries: of those kept by chance divided by it, as p is; [E].

    offsets: as in SparseRows. place: [N, K], the entry of each id, or None.
    """
    scores, all_rows = backward.scores, slice(0, len(backward.scores.logprobs))
    ids = backward.at_ids(backward.forward.extra_tokens, all_rows)
    coef = backward.coefficients(all_rows, ids)
    rows, of_row = row_of_each(offsets, len(p)), normalizer_factor(coef)
    factor = of_row[rows]
    if coef.rest is not None and place is not None:
        at_ids = place[place >= 0]
        others = (of_row - rest_factor(coef, ids))[rows]
        factor = others.index_copy(0, at_ids, factor[at_ids])
    if coef.entropy is not None and scores.entropy is not None:
        surprise = torch.where(p > 0, logp, 0) + scores.entropy[rows]  # logp of an id may be -inf
        factor = factor + coef.entropy[rows] * surprise
    values = -factor * p
    used = (offsets.diff() > 0).nonzero().squeeze(1)  # flat rows have no entries
    first = offsets[used]
    if coef.extra is not None and place is not None:
        add_at(values, place, coef.extra)
        values[first] = 0  # as in Lists.take
    # 0 · log_sum: a row that is not finite has no entries, and must not pass for one
    values[first] = (0 * scores.log_sum - row_sums(values, offsets))[used]
    return values


def with_exact_rows(
    sparse: SparseRows, head: StudentHead, exact: logprobs.BackwardCall, rows: Tensor
) -> Sums:
    """Return the gradients of a sketch and of other rows, which are projected again."""
    needs, flat_head = exact.forward.needs, exact.forward.head
    dtype = accumulator(head.hidden.dtype)
    dx, dw, db = sparse.products(in_one_dtype(head), [dtype] * 3, needs, exact.forward.impl)
    part = torch.empty_like(flat_head.hidden, dtype=dtype) if needs[0] else None
    total = Gradients(flat_head, needs, (part, dw, db))
    _, scale = logprobs.gradients(exact, total)
    if dx is not None and part is not None:
        dx.index_copy_(0, rows, part)
    return (dx, dw, db) if dtype == head.hidden.dtype else rounded((dx, dw, db), head, scale)


@torch.compiler.disable(reason="the number of entries of a sketch depends on the values")
def linear_logprobs(call: LogprobCall, sketch: Sketch) -> RowOutputs:
    """Return the outputs of each row, differentiable once; sketch has N rows."""
    head = call.head
    outputs = _Logprobs.apply(head.hidden, head.weight, head.bias, call, sketch)
    names = ("logprobs", "entropy", "extra_logprobs", "rest_logprob", "topk_tokens")
    return RowOutputs(**dict(zip(names, outputs, strict=True)))
