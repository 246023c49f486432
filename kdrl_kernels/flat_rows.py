"""Keeps dL/dlogits of rows that are too flat to be sketched, for the GEMMs of the backward pass.

They are few where a sketch is worth it. Where they would take more memory than dW in float32, they
are multiplied and added up at once, as the exact gradient is.
"""

import torch
from torch import Tensor

from kdrl_kernels.call import LossCall, RowSet
from kdrl_kernels.head import Head
from kdrl_kernels.objective import Coefficients
from kdrl_kernels.one_pass import Gradients, Sums, chunk_gradient
from kdrl_kernels.plan import accumulator
from kdrl_kernels.rows.streams import Stats, Stream, TeacherStream


def most_elements(head: Head) -> int:
    """Return the elements of dL/dlogits that take as much memory as dW in float32."""
    dtype = head.hidden.dtype
    return head.weight.numel() * accumulator(dtype).itemsize // dtype.itemsize


class FlatRows:
    """Collects the flat rows of all chunks of a loss."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.total: Gradients | None = None
        self.squares: Tensor | float = 0.0

    def take(
        self,
        call: LossCall,
        streams: tuple[Stream, TeacherStream | None],
        stats: Stats,
        coef: Coefficients,
        rows: RowSet,
    ) -> None:
        """Take the gradient of a chunk's rows whose coefficients are not 0."""
        kept, dz = chunk_gradient(call, streams, stats, coef, rows, compact=True)
        self.squares += dz.double().square().sum()
        if isinstance(kept, slice):
            kept = torch.arange(kept.start, kept.stop, device=dz.device)
        if self.total is None:
            self.parts.append((kept, dz.clone()))
            if sum(part.numel() for _, part in self.parts) > most_elements(call.student):
                self.total = Gradients(call.student, call.needs)
                for part in self.parts:
                    self.total.add(call.student, *part)
                self.parts.clear()
        else:
            self.total.add(call.student, kept, dz)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return five tensors that add_to takes: rows and dz, or sums of hidden, weight, bias."""
        if self.total is not None:
            return None, None, *self.total.tensors()
        if not self.parts:
            return (None,) * 5
        return *(torch.cat(values) for values in zip(*self.parts, strict=True)), None, None, None


def add_to(sums: Sums, head: Head, tensors: tuple[Tensor | None, ...], scale: Tensor) -> None:
    """Add scale times what flat rows contribute to dX, dW and db, in float32 or float64."""
    rows, dz, *total = tensors
    for into, values in zip(sums, total, strict=True):
        if into is not None and values is not None:
            into.addcmul_(values, scale)
    if rows is not None and dz is not None:
        Gradients(head, (False,) * 3, sums).add(head, rows, dz * scale)
