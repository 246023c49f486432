"""The chunk loop: project, sweep, coefficients, gradient in place, dX, dW; and its autograd.

The loss depends on the logits of a row only through its log-probability, entropy and KL, so the
gradient of every logit is known as soon as the row has been swept: it is taken in the forward
pass, chunk by chunk, and [N, V] logits never exist. Backward only scales what is there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdrl_kernels import gemm
from kdrl_kernels import rows as row_work
from kdrl_kernels.call import LossCall, RowTerms
from kdrl_kernels.head import Head
from kdrl_kernels.objective import token_losses
from kdrl_kernels.plan import rows_per_chunk
from kdrl_kernels.rows import Stream

Needs = tuple[bool, bool, bool]
"""Whether hidden, weight and bias want a gradient."""


class Chunks:
    """Slices of N rows, and one logits buffer per stream, used again by each slice."""

    def __init__(
        self, head: Head, vocab_size: int, streams: int, impl: str, workspace_bytes: int | None
    ) -> None:
        self.work = row_work.load(impl)
        self.vocab_size = vocab_size
        self.N = len(head.hidden)
        hidden = head.hidden
        dtype = gemm.accumulator(hidden.dtype)
        self.size = rows_per_chunk(
            self.N,
            vocab_size,
            streams=streams,
            dtype=dtype,
            device=hidden.device,
            block_rows=self.work.block_rows(vocab_size, hidden.device),
            block_buffers=self.work.BLOCK_BUFFERS,
            workspace_bytes=workspace_bytes,
        )
        self.buffers = [
            hidden.new_empty(self.size, vocab_size, dtype=dtype) for _ in range(streams)
        ]

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, max(self.N, 1), self.size):  # no rows: one empty chunk
            yield slice(start, min(start + self.size, self.N))

    def project(self, head: Head, rows: slice, buffer: int = 0) -> Stream:
        """Logits of these rows in one of the buffers."""
        logits = self.buffers[buffer][: rows.stop - rows.start]
        gemm.project(head.hidden[rows], head.weight[: self.vocab_size], logits)
        if head.bias is not None:
            logits += head.bias[: self.vocab_size]
        stream = Stream(logits, head.temperature_rows(rows), head.softcap)
        self.work.activate_(stream)
        return stream


class Gradients:
    """dX, dW and db of one pass, in float32, before their common scale."""

    def __init__(self, head: Head, needs: Needs) -> None:
        dtype = gemm.accumulator(head.hidden.dtype)
        hidden, weight, bias = (
            tensor.new_zeros(tensor.shape, dtype=dtype) if need and tensor is not None else None
            for tensor, need in zip((head.hidden, head.weight, head.bias), needs, strict=True)
        )
        self.hidden, self.weight, self.bias = hidden, weight, bias

    def add(self, head: Head, rows: slice, dz: Tensor) -> None:
        """Add the terms of dz [C, V], the gradient of these rows' logits."""
        V = dz.shape[1]
        if self.hidden is not None:
            gemm.grad_hidden(dz, head.weight[:V], self.hidden[rows])
        if self.weight is not None:
            gemm.add_grad_weight(dz, head.hidden[rows], self.weight[:V])
        if self.bias is not None:
            self.bias[:V] += dz.sum(dim=0, dtype=self.bias.dtype)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """(dX, dW, db), None where not needed."""
        return self.hidden, self.weight, self.bias


def scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient · scale, rounded once to dtype; scale is 0-d."""
    if gradient is None:
        return None
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, scale, out=out)


@dataclass(frozen=True, slots=True)
class Pass:
    """Result of one pass over the head."""

    loss: Tensor
    """0-d, normalised."""
    terms: RowTerms
    gradients: Gradients
    scale: Tensor
    """0-d; the true gradients are scale · gradients."""


def run(call: LossCall, impl: str, needs: Needs) -> Pass:
    """All chunks of a loss; gradients only where `needs` asks for one."""
    student, teacher, objective = call.student, call.teacher, call.objective
    exact_teacher = teacher if call.exact_kd else None
    streams = 1 if exact_teacher is None else 2
    chunks = Chunks(student, call.vocab_size, streams, impl, call.workspace_bytes)
    weights, scale = _weights_near_one(call)
    gradients = Gradients(student, needs)
    losses, terms = [], []
    for rows in chunks:
        tokens = call.tokens[rows]
        lq = None
        if teacher is not None and exact_teacher is None:  # its logits go before the student's come
            lq = chunks.work.sweep(chunks.project(teacher, rows), tokens).logprobs
        q = None if exact_teacher is None else chunks.project(exact_teacher, rows, buffer=1)
        p = chunks.project(student, rows)
        stats = chunks.work.sweep(p, tokens, teacher=q, kd=objective.kd, entropy=call.wants_entropy)
        lq = stats.teacher_logprobs if lq is None else lq
        terms.append(RowTerms(stats.logprobs, stats.entropy, lq, stats.kl))
        inputs = call.rows(terms[-1], rows)
        if not any(needs):
            losses.append(weights[rows] * token_losses(objective, inputs))
        else:
            row_losses, coef = chunks.work.coefficients(objective, inputs, weights[rows])
            losses.append(row_losses)
            dz = chunks.work.gradient_(
                p, tokens, stats, coef, teacher=q, kd=objective.kd, dtype=student.hidden.dtype
            )
            gradients.add(student, rows, dz)
    return Pass(torch.cat(losses).sum() * scale, _concatenate(terms), gradients, scale)


def _weights_near_one(call: LossCall) -> tuple[Tensor, Tensor]:
    """([N] weights, 0-d scale) whose product is weights / normalizer.

    Normalising the float32 gradients at the end, not the weights, keeps float16 logit gradients
    clear of 6e-8, where they flush to zero; so does a largest weight of 1.
    """
    weights, scale = call.weights, call.normalizer.reciprocal()
    if call.student.hidden.dtype == torch.float16 and len(weights):
        unit = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
        weights, scale = weights / unit, scale * unit
    return weights, scale


def _concatenate(terms: list[RowTerms]) -> RowTerms:
    """One RowTerms of all chunks; they hold the same fields."""
    names = [field.name for field in fields(RowTerms) if getattr(terms[0], field.name) is not None]
    return RowTerms(**{name: torch.cat([getattr(t, name) for t in terms]) for name in names})


class KdrlLoss(torch.autograd.Function):
    """hidden, weight, bias -> loss and detached row terms. Saves float32 gradients, no logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,  # noqa: ARG004 (an input of the graph; call.student holds it)
        bias: Tensor | None,  # noqa: ARG004 (the same)
        call: LossCall,
        impl: str,
        needs: Needs,
    ) -> tuple[Tensor | None, ...]:
        result = run(call, impl, needs)
        ctx.save_for_backward(*result.gradients.tensors(), result.scale)
        ctx.dtype = hidden.dtype
        terms = result.terms
        detached = (terms.logprobs, terms.entropy, terms.teacher_logprobs, terms.kl)
        ctx.mark_non_differentiable(*(t for t in detached if t is not None))
        return result.loss, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        *gradients, scale = ctx.saved_tensors
        scale = scale * grad_loss
        return *(scaled(gradient, scale, ctx.dtype) for gradient in gradients), None, None, None


def kdrl_loss(call: LossCall, impl: str) -> tuple[Tensor, RowTerms]:
    """(0-d loss, row terms); the loss is differentiable once in hidden, weight and bias."""
    student = call.student
    needs = needs_gradient(student)
    if not any(needs):
        result = run(call, impl, needs)
        return result.loss, result.terms
    loss, logprobs, entropy, teacher_logprobs, kl = KdrlLoss.apply(
        student.hidden, student.weight, student.bias, call, impl, needs
    )
    return loss, RowTerms(logprobs, entropy, teacher_logprobs, kl)


def needs_gradient(head: Head) -> Needs:
    """Which of hidden, weight and bias want a gradient, in the grad mode of the caller."""

    def wants(tensor: Tensor | None) -> bool:
        return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad

    return wants(head.hidden), wants(head.weight), wants(head.bias)
