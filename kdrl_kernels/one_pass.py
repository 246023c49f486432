"""Runs the chunk loop: project, sweep, coefficients, gradient in place, dX, dW.

The loss depends on the logits of a row only through its log-probability, entropy and KL, so the
gradient of every logit is known as soon as the row has been swept: it is taken in the forward
pass, chunk by chunk, and [N, V] logits never exist. Backward only scales the result.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels import gemm
from kdrl_kernels import rows as row_work
from kdrl_kernels.call import LossCall, RowOutputs, RowSet, size_of, take
from kdrl_kernels.checks import check_values, poison
from kdrl_kernels.head import Head, Needs, Sums, in_one_dtype
from kdrl_kernels.objective import NO_GRADIENT, Coefficients
from kdrl_kernels.plan import accumulator, balanced, chunks_of, padded
from kdrl_kernels.rows.entries import FORWARD
from kdrl_kernels.rows.streams import Stats, Stream, TeacherStream
from kdrl_kernels.truncation import truncate_


class Buffers:
    """Holds one logits buffer [rows, vocab_size] per stream, which every chunk uses again."""

    def __init__(
        self,
        head: Head,
        vocab_size: int,
        rows: int,
        streams: int,
        impl: str,
        masses: bool = False,
    ) -> None:
        self.work = row_work.load(impl)
        self.vocab_size = vocab_size
        hidden = head.hidden
        shape = rows, padded(vocab_size)
        dtype = accumulator(hidden.dtype)
        self.streams = [
            hidden.new_empty(shape, dtype=dtype)[:, :vocab_size] for _ in range(streams)
        ]
        self.masses: list[Tensor | None] = [None] * streams
        if masses and self.work.BLOCK:
            shape = rows, padded(vocab_size) // self.work.BLOCK
            self.masses = [hidden.new_empty(shape, dtype=dtype) for _ in range(streams)]

    def project(
        self, head: Head, rows: RowSet, stream: int = 0, out: Tensor | None = None
    ) -> Stream:
        """Compute the logits of some rows, in the buffer of a stream or in out."""
        hidden = take(head.hidden, rows)
        logits = self.streams[stream][: len(hidden)] if out is None else out
        gemm.project(hidden, head.weight[: self.vocab_size], logits)
        if head.bias is not None:
            logits += head.bias[: self.vocab_size]
        temperature = head.temperature
        if isinstance(temperature, Tensor):
            temperature = take(temperature, rows)
        masses = self.masses[stream]
        masses = None if masses is None else masses[: len(hidden)]
        return Stream(logits, temperature, head.softcap, masses=masses)


def gradient_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """View the memory of float32 logits [C, V] as [C, V] of dtype, rows where they were."""
    return logits if logits.dtype == dtype else logits.view(dtype)[:, : logits.shape[1]]


class Gradients:
    """Accumulates dX, dW and db of one pass in float32, before their common scale."""

    masses = False
    """Whether sweeps must write the mass of each block of columns."""

    def __init__(self, head: Head, needs: Needs, sums: Sums | None = None) -> None:
        """Begin at 0, or go on with sums of hidden, weight and bias that are there already."""
        dtype = accumulator(head.hidden.dtype)
        if sums is not None:
            self.hidden, self.weight, self.bias = sums
        else:
            self.hidden = (
                head.hidden.new_zeros(head.hidden.shape, dtype=dtype) if needs[0] else None
            )
            self.weight = (
                head.weight.new_empty(head.weight.shape, dtype=dtype) if needs[1] else None
            )
            self.bias = None
            if needs[2] and head.bias is not None:
                self.bias = head.bias.new_zeros(head.bias.shape, dtype=dtype)
        self.first = sums is None
        self.unit = None
        if head.hidden.dtype == torch.float16:
            self.unit = head.hidden.new_full((), torch.finfo(dtype).tiny, dtype=dtype)

    def in_unit(self, coef: Coefficients) -> Coefficients:
        """Divide float16 coefficients by the largest so far; return those of other dtypes as is.

        float16 rounds below 6e-8 to 0 and above 65,504 to infinity. The sums of dW and db so far
        move to the new unit.
        """
        if self.unit is None:
            return coef
        unit = torch.maximum(self.unit, coef.largest())
        for gradient in (self.weight, self.bias):
            if gradient is not None and not self.first:
                gradient.mul_(self.unit / unit)
        self.unit = unit
        return coef.map(lambda values: values / unit)

    def add(self, head: Head, rows: RowSet, dz: Tensor) -> None:
        """Add what dz [C, V], the gradient of these rows' logits, contributes."""
        V = dz.shape[1]
        if self.hidden is not None and isinstance(rows, slice):
            part = self.hidden[rows]
            gemm.grad_hidden(dz, head.weight[:V], part)
            if self.unit is not None:
                part *= self.unit
        elif self.hidden is not None and isinstance(rows, Tensor):
            part = self.hidden.new_empty(len(dz), self.hidden.shape[1])
            gemm.grad_hidden(dz, head.weight[:V], part)
            self.hidden.index_copy_(0, rows, part if self.unit is None else part * self.unit)
        if self.weight is not None:
            gemm.add_grad_weight(dz, take(head.hidden, rows), self.weight[:V], first=self.first)
            if self.first:
                self.weight[V:] = 0
        if self.bias is not None:
            self.bias[:V] += dz.sum(dim=0, dtype=self.bias.dtype)
        self.first = False

    def take(
        self,
        call: LossCall,
        streams: tuple[Stream, TeacherStream | None],
        stats: Stats,
        coef: Coefficients,
        rows: RowSet,
    ) -> int:
        """Add the gradient of a chunk, over its logits; return the rows that went into it."""
        kept, dz = chunk_gradient(call, streams, stats, self.in_unit(coef), rows, call.compact)
        self.add(call.student, kept, dz)
        return size_of(kept)

    def tensors(self) -> Sums:
        """Return dX, dW and db, None where not needed."""
        return self.hidden, self.weight, self.bias

    def finish_(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Undo the unit, scale what backward does not round, and return the scale that is left."""
        if self.weight is not None and self.first:
            self.weight.zero_()  # no row had a gradient
        for gradient in (self.weight, self.bias):
            if gradient is not None and self.unit is not None:
                gradient.mul_(self.unit)
        if dtype != accumulator(dtype):
            return scale
        for gradient in self.tensors():
            if gradient is not None:
                gradient.mul_(scale)
        return torch.ones_like(scale)


class Compaction:
    """Moves the rows whose logits have a gradient to the front of a chunk, in place.

    A used row beyond their count goes into the slot of an unused one before it, whose logits are
    not needed any more, so no slot is written while the row in it is still to be read.
    """

    def __init__(self, coef: Coefficients) -> None:
        used = coef.used()
        n = torch.arange(len(used), device=used.device)
        count = used.sum()
        holes = ~used & (n < count)
        movers = torch.where(used & (n >= count), n, len(used)).sort().values
        source = torch.where(holes, movers[(holes.cumsum(0) - 1).clamp_min(0)], n)
        self.source: Tensor | None = torch.where(n < count, source, -1)
        self._count = count.to("cpu", non_blocking=True)
        self._ready = torch.cuda.Event() if count.is_cuda else None
        if self._ready is not None:
            self._ready.record()
        elif int(count) == len(used):
            self.source = None  # known at once: nothing moves

    def rows(self, rows: RowSet) -> RowSet:
        """Return the rows that are left, in the order of their slots; waits for their number.

        The caller queues the gradient kernel first, so that the GPU works while the host waits.
        """
        if self._ready is not None:
            self._ready.synchronize()
        count = int(self._count)
        if self.source is None or count == len(self.source):
            return rows
        source = self.source[:count]
        return rows[source] if isinstance(rows, Tensor) else source + rows.start


def chunk_gradient(
    call: LossCall,
    streams: tuple[Stream, TeacherStream | None],
    stats: Stats,
    coef: Coefficients,
    rows: RowSet,
    compact: bool,
) -> tuple[RowSet, Tensor]:
    """Write the gradient of a chunk over its logits; return the rows that have one, and dL/dlogits.

    compact: whether rows whose coefficients are 0 are left out.
    """
    compaction = Compaction(coef) if compact else None
    p, q = streams
    dz = row_work.load(call.impl).gradient(
        p,
        take(call.tokens, rows),
        stats,
        coef,
        out=gradient_view(p.logits, call.student.hidden.dtype),
        teacher=q,
        source=compaction.source if compaction else None,
    )
    kept = compaction.rows(rows) if compaction else rows
    return kept, dz[: size_of(kept)]


@dataclass(frozen=True, slots=True)
class Pass:
    """Holds the result of one pass over the head."""

    loss: Tensor
    """0-d, the normalised loss."""
    rows: RowOutputs
    """[N] outputs, 0 in rows of weight 0."""
    counts: Tensor
    """[3] int64: rows projected, rows that went into dX and dW, tokens out of range."""
    gradients: Any
    """What collected the gradient of each chunk."""
    scale: Tensor
    """0-d; scale · gradients is the gradient of the loss."""
    active: RowSet
    """The rows of weight other than 0."""


def run(call: LossCall, collector: Any = None) -> Pass:
    """Run all chunks of a loss; compute the gradients that call.needs names.

    collector: what takes the gradient of each chunk, as Gradients does; None: new Gradients.
    """
    student, needs = in_one_dtype(call.student), call.needs
    teacher = None if call.teacher is None else in_one_dtype(call.teacher)
    bad = check_values(call)
    tokens = call.tokens.clamp(0, call.vocab_size - 1)  # reads stay inside
    call = replace(call, tokens=tokens, student=student, teacher=teacher)
    active = call.active_rows()
    N = size_of(active)
    size = balanced(N, call.max_rows)
    gradients = Gradients(student, needs) if collector is None else collector
    streams, masses = 2 if call.exact_kd else 1, gradients.masses and any(needs)
    buffers = Buffers(student, call.vocab_size, size, streams, call.impl, masses)
    work = buffers.work
    weights = call.row_weights(active, accumulator(student.hidden.dtype))
    scale = poison(call.total(weights).reciprocal(), bad)
    losses, outputs, gradient_rows, constant = [], [], 0, any(needs) and N > 0
    for part in chunks_of(N, size):
        rows = active[part] if isinstance(active, Tensor) else part
        p, q, stats, chunk_outputs = _statistics(call, buffers, rows)
        outputs.append(chunk_outputs)
        inputs = call.rows(chunk_outputs, rows)
        if not any(needs):
            losses.append(weights[part] * call.loss.losses(inputs))
            continue
        row_losses, coef = work.coefficients(call.loss, inputs, weights[part])
        losses.append(row_losses)
        if coef is None:
            gradient_rows += 0 if call.compact else size_of(rows)
            continue
        constant = False
        gradient_rows += gradients.take(call, (p, q), stats, coef, rows)
    if constant:
        raise ValueError(NO_GRADIENT)
    loss = torch.cat(losses).sum() * scale
    return Pass(
        loss=loss,
        rows=_concatenate(outputs).spread(active, len(call.tokens)),
        counts=torch.stack([torch.full_like(bad, n) for n in (N, gradient_rows)] + [bad]),
        gradients=gradients,
        scale=gradients.finish_(scale, student.hidden.dtype),
        active=active,
    )


def _statistics(
    call: LossCall, buffers: Buffers, rows: RowSet
) -> tuple[Stream, TeacherStream | None, Stats, RowOutputs]:
    """Project and sweep some rows; return the streams, their statistics and the row outputs."""
    tokens, teacher, kd = take(call.tokens, rows), call.teacher, call.exact_kd
    q, lq = None, None
    if teacher is not None and kd is not None:
        logits = buffers.project(teacher, rows, stream=1)
        q = TeacherStream(
            logits.logits,
            logits.temperature,
            logits.softcap,
            kd,
            call.loss.jsd_alpha,
            masses=logits.masses if kd in FORWARD else None,
        )
    elif teacher is not None:  # its logits go before the student's come
        q_alone = replace(buffers.project(teacher, rows), masses=None)
        lq = buffers.work.sweep(q_alone, tokens).logprobs
    p = buffers.project(call.student, rows)
    truncate_(p.logits, tokens, p.temperature, call.truncation)
    stats = buffers.work.sweep(p, tokens, teacher=q, entropy=call.wants_entropy)
    lq = stats.teacher_logprobs if lq is None else lq
    lse = None
    if call.loss.lse:  # in the dtype of the logits, whatever that of a temperature of each row
        lse = (stats.max / p.temperature + stats.log_sum).to(stats.max.dtype)
    return (
        p,
        q,
        stats,
        RowOutputs(stats.logprobs, stats.entropy, lq, stats.kl, stats.forward_kl, lse),
    )


def _concatenate(chunks: list[RowOutputs]) -> RowOutputs:
    """Join the outputs of all chunks, which hold the same fields."""
    names = [field.name for field in fields(RowOutputs)]
    names = [name for name in names if getattr(chunks[0], name) is not None]
    return RowOutputs(**{name: torch.cat([getattr(c, name) for c in chunks]) for name in names})


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient · scale, rounded once to dtype; scale is 0-d."""
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, scale, out=out)


def scaled_(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient · scale in dtype, in place where the dtype is already right."""
    return gradient.mul_(scale) if gradient.dtype == dtype else scaled(gradient, scale, dtype)


def needs_scaling(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
    """Say whether gradient · scale in dtype differs from gradient; always true on a GPU.

    There the value of scale would cost a wait. On a CPU, False saves a second copy of dW, which is
    most of what a small model would hold.
    """
    plain = gradient.dtype == dtype and scale.device.type == "cpu"
    return not plain or torch.is_grad_enabled() or torch.compiler.is_compiling() or bool(scale != 1)
