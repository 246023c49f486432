"""Runs the chunk loop: project, sweep, coefficients, gradient in place, dX, dW.

The loss depends on the logits of a row only through its log-probability, entropy and KL, so the
gradient of every logit is known as soon as the row has been swept: it is taken in the forward
pass, chunk by chunk, and [N, V] logits never exist. Backward only scales the result.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels.buffers import Buffers
from kdrl_kernels.call import LossCall, RowOutputs, RowSet, size_of, take
from kdrl_kernels.caller_loss import NO_GRADIENT
from kdrl_kernels.checks import check_values, poison
from kdrl_kernels.chunks import accumulator, balanced, chunks_of, held_rows
from kdrl_kernels.gradients import Chunk, Gradients
from kdrl_kernels.head import in_one_dtype
from kdrl_kernels.objective import Objective
from kdrl_kernels.rows.entries import FORWARD
from kdrl_kernels.rows.streams import Stats, Stream, TeacherStream
from kdrl_kernels.topk import TopkDivergence, topk_divergence
from kdrl_kernels.topk_checks import check_topk_values
from kdrl_kernels.truncation import truncate_
from kdrl_kernels.vocab_shard import VocabShard


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


def run(call: LossCall, collector: Any = None, shard: VocabShard | None = None) -> Pass:
    """Run all chunks of a loss; compute the gradients that call.needs names.

    collector: what takes the gradient of each chunk, as Gradients does; None: new Gradients.
    shard: the columns that this rank holds of call.vocab_size, those of the weights; None: all.
    """
    student, needs = in_one_dtype(call.student), call.needs
    teacher = None if call.teacher is None else in_one_dtype(call.teacher)
    bad = check_values(call)
    check_topk_values(call)
    tokens = call.tokens.clamp(0, call.vocab_size - 1)  # reads stay inside
    call = replace(call, tokens=tokens, student=student, teacher=teacher)
    active = call.active_rows()
    N = size_of(active)
    size = balanced(N, call.max_rows, student.hidden.device)
    weights = call.row_weights(active, accumulator(student.hidden.dtype))
    scale = poison(call.total(weights).reciprocal(), bad)
    gradients = collector
    if gradients is None:
        factor, direct = scale if call.folded else None, call.direct and size >= N
        gradients = Gradients(
            student, needs, shard=shard, impl=call.impl, factor=factor, direct=direct
        )
    streams, masses = 2 if call.exact_kd else 1, gradients.masses and any(needs)
    V = call.vocab_size if shard is None else shard.columns
    held = held_rows(size, call.max_rows, student.hidden.device)
    buffers = Buffers(student, V, held, streams, call.impl, masses, shard)
    work = buffers.work
    losses, outputs, gradient_rows, constant = [], [], 0, any(needs) and N > 0
    for part in chunks_of(N, size):
        rows = active[part] if isinstance(active, Tensor) else part
        p, q, stats, chunk_outputs = _statistics(call, buffers, rows)
        topk = _topk(call, chunk_outputs, rows)
        if topk is not None:
            chunk_outputs = replace(chunk_outputs, kl=topk.value)
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
        coef = coef if topk is None else topk.in_ids(coef)
        coef = coef if stats.at_ids is None else stats.at_ids.live(coef)
        gradient_rows += gradients.take(call, Chunk(rows, p, q, stats, coef))
    if constant:
        raise ValueError(NO_GRADIENT)
    loss = torch.cat(losses).sum() * scale
    return Pass(
        loss=loss,
        rows=_concatenate(outputs).spread(active, len(call.tokens)),
        counts=torch.stack([_count(N, bad), _count(gradient_rows, bad), bad]),
        gradients=gradients,
        scale=gradients.finish_(scale, student.hidden.dtype),
        active=active,
    )


def _statistics(
    call: LossCall, buffers: Buffers, rows: RowSet
) -> tuple[Stream, TeacherStream | None, Stats, RowOutputs]:
    """Project and sweep some rows; return the streams, their statistics and the row outputs."""
    tokens, teacher, kd = take(call.tokens, rows), call.teacher, call.exact_kd
    q, alone = None, None
    if teacher is not None and kd is not None:
        logits = buffers.project(teacher, rows, stream=1)
        q = TeacherStream(
            logits.logits,
            logits.temperature,
            logits.softcap,
            kd,
            call.loss.jsd_alpha,
            entropy=call.loss.teacher_entropy,
            masses=logits.masses if kd in FORWARD else None,
        )
    elif teacher is not None:  # its logits go before the student's come
        q_alone = replace(buffers.project(teacher, rows), masses=None)
        alone = buffers.work.sweep(q_alone, tokens, entropy=call.loss.teacher_entropy)
    p = buffers.project(call.student, rows)
    truncate_(p.logits, tokens, p.temperature, call.truncation)
    ids = None
    if call.extra_tokens is not None:  # clamped by the chunk: a copy of all takes 8 bytes an id
        ids = take(call.extra_tokens, rows).clamp(-1, call.vocab_size - 1)
    stats = buffers.work.sweep(
        p, tokens, teacher=q, entropy=call.wants_entropy, ids=ids, rest=call.rest
    )
    outputs = RowOutputs(
        logprobs=stats.logprobs,
        entropy=stats.entropy,
        teacher_logprobs=stats.teacher_logprobs if alone is None else alone.logprobs,
        kl=stats.kl,
        forward_kl=stats.forward_kl,
        lse=stats.lse(p.temperature) if call.loss.lse else None,
        teacher_entropy=stats.teacher_entropy if alone is None else alone.entropy,
    )
    if stats.at_ids is not None:
        at_ids = stats.at_ids
        outputs = replace(outputs, extra_logprobs=at_ids.logprobs, rest_logprob=at_ids.rest)
    return p, q, stats, outputs


def _topk(call: LossCall, outputs: RowOutputs, rows: RowSet) -> TopkDivergence | None:
    """Return the divergence of some rows over K tokens, and its derivatives, if there is one."""
    if call.teacher_topk is None:
        return None
    assert isinstance(call.loss, Objective)
    assert call.loss.topk_kd is not None
    inputs = call.topk_logprobs(outputs, rows)
    return topk_divergence(call.loss.topk_kd, *inputs, call.loss.jsd_alpha)


def _count(number: int | Tensor, like: Tensor) -> Tensor:
    """Return a number of rows, which a sketch leaves on the device, as a 0-d tensor."""
    return number if isinstance(number, Tensor) else torch.full_like(like, number)


def _concatenate(chunks: list[RowOutputs]) -> RowOutputs:
    """Join the outputs of all chunks, which hold the same fields."""
    names = [field.name for field in fields(RowOutputs)]
    names = [name for name in names if getattr(chunks[0], name) is not None]
    return RowOutputs(**{name: torch.cat([getattr(c, name) for c in chunks]) for name in names})
