"""Runs the floor: nothing but the GEMMs of an operation, into buffers that already exist.

A chunk of C rows is projected, and its gradient GEMMs read a dz of the same shape and of the kind
that softmax leaves. No row work, no allocation, no conversion. Chunks are the library's own choice,
and cost time of their own: each reads the sum of dW anew, and its GEMMs have fewer waves. So on a
GPU all rows are one chunk where they fit.
"""

import torch
from torch import Tensor

from bench.inputs import Inputs
from bench.machine import DEVICE
from bench.ops import Op
from bench.shapes import Shape
from kdrl_kernels.chunks import padded

ROWS = 2048
"""C on a CPU, and the least on a GPU."""
MEMORY_SHARE = 8
"""A GPU's memory is this many times that of the floor's logits and dz at most."""
FILLED_ROWS = 256
"""Rows of dz that are filled at a time."""


def chunk_rows(shape: Shape) -> int:
    """Return C: all rows where an eighth of a GPU's memory holds logits and dz, else a part."""
    if DEVICE == "cpu":
        return ROWS
    row_bytes = padded(max(shape.V, shape.V_t)) * (4 + shape.dtype.itemsize)
    budget: int = torch.cuda.get_device_properties(0).total_memory // MEMORY_SHARE
    return min(shape.N, max(ROWS, budget // row_bytes // 128 * 128))


class Floor:
    """The bare GEMMs of all operations on one set of inputs, which share their buffers."""

    def __init__(self, inputs: Inputs, rows: int | None = None) -> None:
        """rows: C; None: chunk_rows."""
        self.inputs, self.rows = inputs, min(rows or chunk_rows(inputs.shape), inputs.shape.N)
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        V = max(inputs.shape.V, inputs.shape.V_t)
        self.logits = self._new(self.rows * padded(V))
        self.dx = self._new(self.rows, inputs.shape.H)
        self.dw = self._new(inputs.shape.V, inputs.shape.H)
        z = self._logits(inputs.shape.V, self.rows)
        _mm(hidden[: self.rows], weight.T, z)
        self.dz = torch.empty_like(
            self.logits[: self.rows * padded(inputs.shape.V)], dtype=hidden.dtype
        )
        self.dz = self.dz.view(self.rows, -1)[:, : inputs.shape.V]
        for start in range(0, self.rows, FILLED_ROWS):
            part = slice(start, min(start + FILLED_ROWS, self.rows))
            self.dz[part] = torch.softmax(z[part], dim=1) * inputs.advantages[part, None]

    def run(self, op: Op, other_inputs: Inputs | None = None, projections: int = 1) -> None:
        """Run all GEMMs of one call of the operation: op.flop(shape). Other inputs have this shape.

        projections: of the student; 2 is the floor of a library that projects again in backward.
        """
        inputs = other_inputs or self.inputs
        shape, hidden, weight = inputs.shape, inputs.hidden.detach(), inputs.weight.detach()
        for start in range(0, shape.N, self.rows):
            part = slice(start, min(start + self.rows, shape.N))
            C = part.stop - part.start
            if op.teacher_head:
                teacher, teacher_weight = inputs.teacher_hidden, inputs.teacher_weight
                if op.teachers == 2:
                    teacher, teacher_weight = inputs.two_teachers
                _mm(teacher[part], teacher_weight.T, self._logits(shape.V_t, C))
            for _ in range(projections):
                _mm(hidden[part], weight.T, self._logits(shape.V, C))
            active = round(C * op.active)
            dz = self.dz[:active]
            if "hidden" in op.gradients:
                _mm(dz, weight, self.dx[:active])
            if "weight" in op.gradients:
                into = _mm if start == 0 else _add_mm
                into(dz.T, hidden[part][:active], self.dw)

    def _new(self, *size: int) -> Tensor:
        return torch.zeros(*size, dtype=torch.float32, device=self.inputs.hidden.device)

    def _logits(self, V: int, C: int) -> Tensor:
        """Return [C, V] of the buffer with the library's row stride: odd ones slow GEMMs down."""
        stride = padded(V)
        return self.logits[: C * stride].view(C, stride)[:, :V]


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out = a · b in float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out += a · b in float32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
