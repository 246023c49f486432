"""Adds the gradients of all chunks: dX, dW and db in float32, and their scale."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels import gemm
from kdrl_kernels import rows as row_work
from kdrl_kernels.buffers import gradient_view
from kdrl_kernels.call import LossCall, RowSet, size_of, take
from kdrl_kernels.chunks import accumulator, needs_no_sum
from kdrl_kernels.compaction import Compaction
from kdrl_kernels.head import Head, Needs, Sums
from kdrl_kernels.rows.streams import Stats, Stream, TeacherStream
from kdrl_kernels.scaling import scale_
from kdrl_kernels.token_rows import Coefficients
from kdrl_kernels.unit import first_unit, gradient_bound, next_unit
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


def is_on_gpu(hidden: Tensor) -> bool:
    """Say whether GEMMs of these hidden states write 16 bits at no cost; a CPU widens them."""
    return hidden.is_cuda


def writes_at_once(head: Head, one_chunk: bool) -> bool:
    """Say whether the GEMM of the only chunk writes dW in the dtype of weight."""
    hidden, weight = head.hidden, head.weight
    direct = needs_no_sum(weight.dtype, len(weight) * head.trained_columns)
    return one_chunk and hidden.dtype == weight.dtype and direct and is_on_gpu(hidden)


def sums_need_no_rounding(head: Head) -> bool:
    """Say whether the float32 sum of dW is its gradient, so that a scale alone is left to do."""
    mixed = head.hidden.dtype == torch.bfloat16 and head.weight.dtype == torch.float32
    return mixed and is_on_gpu(head.hidden)


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
        impl: str = "torch",
        *,
        factor: Tensor | None = None,
        direct: bool = False,
    ) -> None:
        """Begin at 0, or go on with sums of hidden, weight and bias that are there already.

        shard: the columns that this rank holds; None: all. impl: what multiplies sums. factor: what
        coefficients are multiplied with, in place of the sums at the end. direct: dW has the dtype
        of weight, which its only chunk writes.
        """
        self.shard, self.impl, self.factor = shard, impl, factor
        dtype = accumulator(head.hidden.dtype)
        if sums is not None:
            self.hidden, self.weight, self.bias = sums
        else:
            self.hidden = (
                head.hidden.new_zeros(head.hidden.shape, dtype=dtype) if needs[0] else None
            )
            size = len(head.weight), head.trained_columns
            kept = head.weight.dtype if direct else dtype
            self.weight = head.weight.new_empty(size, dtype=kept) if needs[1] else None
            self.bias = None
            if needs[2] and head.bias is not None:
                self.bias = head.bias.new_zeros(head.bias.shape, dtype=dtype)
        self.first = sums is None
        self.unit = first_unit(head.hidden) if head.hidden.dtype == torch.float16 else None

    def in_unit(
        self, coef: Coefficients, stats: Stats, temperature: float | Tensor
    ) -> Coefficients:
        """Divide float16 coefficients by the unit; return those of other dtypes as is.

        Sums of dW and db so far move to a new unit, which few chunks choose: another one costs no
        pass over dW.
        """
        if self.unit is None:
            return coef
        unit = next_unit(self.unit, gradient_bound(coef, stats, temperature))
        for gradient in (self.weight, self.bias):
            if gradient is not None and not self.first:
                scale_(gradient, self.unit / unit, self.impl)
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
        coef, factor = chunk.coef, self.factor
        coef = coef if factor is None else coef.map(lambda values: values * factor)
        coef = self.in_unit(coef, chunk.stats, chunk.student.temperature)
        chunk = replace(chunk, coef=coef)
        kept, dz = chunk_gradient(call, chunk, call.compact, self.shard)
        self.add(call.student, kept, dz)
        return size_of(kept)

    def tensors(self) -> Sums:
        """Return dX, dW and db, None where not needed."""
        return self.hidden, self.weight, self.bias

    def finish_(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Put all in one unit, scale what backward does not round; return the scale that is left.

        That is also the unit of dW and db. dX is complete: it moves to their unit, since it is the
        smaller one.
        """
        if self.weight is not None and self.first:
            self.weight.zero_()  # no row had a gradient
        if self.shard is not None and self.hidden is not None:
            self.shard.add_up_(self.hidden)
        if self.factor is not None:
            scale = torch.ones_like(scale)
        if self.unit is not None:
            if self.hidden is not None:
                self.hidden.div_(self.unit)
            return scale * self.unit
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
