"""Adds the gradients of all chunks: dX, dW and db in float32, and their scale."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels import gemm
from kdrl_kernels import rows as row_work
from kdrl_kernels.buffers import gradient_view
from kdrl_kernels.call import LossCall, RowSet, size_of, take
from kdrl_kernels.compaction import Compaction
from kdrl_kernels.head import Head, Needs, Sums
from kdrl_kernels.plan import accumulator
from kdrl_kernels.rows.streams import Stats, Stream, TeacherStream
from kdrl_kernels.token_rows import Coefficients
from kdrl_kernels.vocab_shard import VocabShard


@dataclass(frozen=True, slots=True)
class Chunk:
    """Holds what a pass knows of some rows when their gradient is taken."""

    rows: RowSet
    """Their places in the call."""
    student: Stream
    teacher: TeacherStream | None
    """For an exact divergence."""
    stats: Stats
    coef: Coefficients


class Gradients:
    """Accumulates dX, dW and db of one pass in float32, before their common scale."""

    masses = False
    """Whether sweeps must write the mass of each block of columns."""

    def __init__(
        self,
        head: Head,
        needs: Needs,
        sums: Sums | None = None,
        shard: VocabShard | None = None,
    ) -> None:
        """Begin at 0, or go on with sums of hidden, weight and bias that are there already.

        shard: the columns that this rank holds; None: all.
        """
        self.shard = shard
        dtype = accumulator(head.hidden.dtype)
        if sums is not None:
            self.hidden, self.weight, self.bias = sums
        else:
            self.hidden = (
                head.hidden.new_zeros(head.hidden.shape, dtype=dtype) if needs[0] else None
            )
            size = len(head.weight), head.trained_columns
            self.weight = head.weight.new_empty(size, dtype=dtype) if needs[1] else None
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
            hidden = take(head.trained_hidden, rows)
            gemm.add_grad_weight(dz, hidden, self.weight[:V], first=self.first)
            if self.first:
                self.weight[V:] = 0
        if self.bias is not None:
            self.bias[:V] += dz.sum(dim=0, dtype=self.bias.dtype)
        self.first = False

    def take(self, call: LossCall, chunk: Chunk) -> int:
        """Add the gradient of a chunk, over its logits; return the rows that went into it."""
        chunk = replace(chunk, coef=self.in_unit(chunk.coef))
        kept, dz = chunk_gradient(call, chunk, call.compact, self.shard)
        self.add(call.student, kept, dz)
        return size_of(kept)

    def tensors(self) -> Sums:
        """Return dX, dW and db, None where not needed."""
        return self.hidden, self.weight, self.bias

    def finish_(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Undo the unit, scale what backward does not round, and return the scale that is left."""
        if self.weight is not None and self.first:
            self.weight.zero_()  # no row had a gradient
        if self.shard is not None and self.hidden is not None:
            self.shard.add_up_(self.hidden)
        for gradient in (self.weight, self.bias):
            if gradient is not None and self.unit is not None:
                gradient.mul_(self.unit)
        if dtype != accumulator(dtype):
            return scale
        for gradient in self.tensors():
            if gradient is not None:
                gradient.mul_(scale)
        return torch.ones_like(scale)


def chunk_gradient(
    call: LossCall, chunk: Chunk, compact: bool, shard: VocabShard | None = None
) -> tuple[RowSet, Tensor]:
    """Write the gradient of a chunk over its logits; return the rows that have one, and dL/dlogits.

    compact: whether rows whose coefficients are 0 are left out. shard: as in Gradients.
    """
    compaction = Compaction(chunk.coef, call.impl) if compact else None
    work: Any = row_work.load(call.impl) if shard is None else shard
    dz: Tensor = work.gradient(
        chunk.student,
        take(call.tokens, chunk.rows),
        chunk.stats,
        chunk.coef,
        out=gradient_view(chunk.student.logits, call.student.hidden.dtype),
        teacher=chunk.teacher,
        source=compaction.source if compaction else None,
    )
    kept = compaction.rows(chunk.rows) if compaction else chunk.rows
    return kept, dz[: size_of(kept)]


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
