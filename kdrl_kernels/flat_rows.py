"""Keeps dL/dlogits of rows that are too flat to be sketched, for the GEMMs of the backward pass.

They are few where a sketch is worth it. Where they would take more than a quarter of the memory of
the weight in float32, they are multiplied and added up at once, as the exact gradient is.
"""

import torch
from torch import Tensor

from kdrl_kernels import gemm
from kdrl_kernels.call import LossCall, take
from kdrl_kernels.chunks import accumulator
from kdrl_kernels.gradients import Chunk, Gradients, chunk_gradient
from kdrl_kernels.head import Head, Sums


def most_kept(head: Head) -> int:
    """Return the elements of dL/dlogits that take a quarter of the memory of weight in float32."""
    dtype = head.hidden.dtype
    return head.weight.numel() * accumulator(dtype).itemsize // dtype.itemsize // 4


class FlatRows:
    """Collects the flat rows of all chunks of a loss."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.dz: list[Tensor] = []
        self.total: Gradients | None = None
        self.squares: Tensor | float = 0.0

    def take(self, call: LossCall, chunk: Chunk) -> None:
        """Take the gradient of a chunk's rows whose coefficients are not 0."""
        kept, dz = chunk_gradient(call, chunk, compact=True)
        self.squares += torch.linalg.vector_norm(dz, dtype=accumulator(dz.dtype)).double().square()
        held = sum(part.numel() for part in self.dz) + dz.numel()
        if self.total is None and held <= most_kept(call.student):
            self.rows.append(torch.arange(len(call.tokens), device=dz.device)[kept])
            self.dz.append(dz.clone())
            return
        if self.total is None:
            self.total = Gradients(call.student, call.needs)
            for part in zip(self.rows, self.dz, strict=True):
                self.total.add(call.student, *part)
            self.rows, self.dz = [], []
        self.total.add(call.student, kept, dz)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return rows and dz of what is kept, or sums of hidden, weight and bias; else None."""
        if self.total is not None:
            return None, None, *self.total.tensors()
        if not self.dz:
            return (None,) * 5
        return _joined(self.rows), _joined(self.dz), None, None, None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_to(sums: Sums, head: Head, rows: Tensor, dz: Tensor, scale: Tensor) -> None:
    """Add scale times what flat rows contribute to dX, dW and db, in float32 or float64."""
    (dx, dw, db), V = sums, dz.shape[1]
    if dx is not None:
        part = dx.new_empty(len(rows), dx.shape[1])
        gemm.grad_hidden(dz, head.weight[:V], part)
        dx.index_copy_(0, rows, part.mul_(scale))
    if dw is not None:
        gemm.add_grad_weight(dz, take(head.trained_hidden, rows) * scale, dw[:V])
    if db is not None:
        db[:V] += dz.sum(dim=0, dtype=db.dtype) * scale
