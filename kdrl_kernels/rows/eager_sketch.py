"""Chooses the entries of a sketched gradient in PyTorch: blocks of columns first, then columns.

The sweep has left exp(d) in the place of the logits, and the mass of each block of columns. A block
is read again only where the running mass, in units of the row's threshold, passes a whole number
in it. Maths: SKETCH.md.
"""

import torch
from torch import Tensor

from kdrl_kernels.rows import eager_gradient
from kdrl_kernels.rows.entries import BLOCK, FORWARD, Entries, Grid
from kdrl_kernels.rows.streams import Stats, Stream, TeacherStream
from kdrl_kernels.token_rows import Coefficients

GROUP_ELEMENTS = 1 << 21
"""Logits of the rows whose entries are chosen together: 8 MB of float32, if all are read."""


def sketch(
    student: Stream,
    stats: Stats,
    coef: Coefficients,
    grid: Grid,
    teacher: TeacherStream | None = None,
) -> tuple[Entries, Tensor]:
    """Return the entries of dL/dz that are kept, after a sweep that wrote masses; flat rows."""
    C, V = student.logits.shape
    step = max(1, GROUP_ELEMENTS // V)
    parts = [
        _keep(student, stats, grid, teacher, slice(start, min(start + step, C)))
        for start in range(0, max(C, 1), step)
    ]
    row, column, chance, flat = (torch.cat(values) for values in zip(*parts, strict=True))
    value, logp = eager_gradient.entries(student, stats, coef, teacher, row, column)
    return Entries(row, column, chance, value.div_(chance), logp), flat


def _keep(
    student: Stream, stats: Stats, grid: Grid, teacher: TeacherStream | None, rows: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return row, column and chance of the kept entries of some rows; which rows are flat."""
    if teacher is not None and teacher.kd not in FORWARD:
        teacher = None  # p alone decides
    weight = 1 if teacher is None else 2
    starts, total = grid.uniforms[rows, None], stats.log_sum[rows].double().exp()
    unit = 1 / (weight * grid.thresholds[rows] * total)
    units, unit_t = _masses(student, rows) * unit[:, None], None
    if teacher is not None:
        assert stats.teacher_log_sum is not None
        total_t = stats.teacher_log_sum[rows].double().exp()
        unit_t = 1 / (weight * grid.thresholds[rows] * total_t)
        units += _masses(teacher, rows) * unit_t[:, None]
    ends = units.cumsum(dim=1).add_(starts)
    starts = torch.cat([starts, ends[:, :-1]], dim=1)
    # a block that fills its unit holds a whole number, however its columns are rounded
    read = ((ends.floor() > starts.floor()) | (units > 0.999)).view(-1).nonzero().squeeze(1)
    n, block = read // units.shape[1], read % units.shape[1]
    lengths = _lengths(student, stats, teacher, unit, unit_t, rows.start, n, block)
    # other blocks have as many entries as they have units, on average
    units.view(-1)[read] = lengths.clamp(max=1).sum(dim=1).to(units.dtype)
    flat = units.sum(dim=1) > grid.most_entries
    sketched = (~flat[n]).nonzero().squeeze(1)
    if len(sketched) < len(n):
        lengths, n, block, read = (x[sketched] for x in (lengths, n, block, read))
    # whole units change nothing for what follows: without them the sums are more precise
    begin = starts.view(-1)[read].frac_().to(lengths.dtype)
    ends = lengths.frac().cumsum(dim=1).add_(begin[:, None]).floor_()
    kept = lengths >= 1
    kept[:, 0] |= ends[:, 0] > 0
    kept[:, 1:] |= ends[:, 1:] > ends[:, :-1]
    place = kept.view(-1).nonzero().squeeze(1)
    chance, of = lengths.view(-1)[place].clamp_(max=1), place // BLOCK
    return n[of] + rows.start, block[of] * BLOCK + place % BLOCK, chance, flat


def _lengths(
    student: Stream,
    stats: Stats,
    teacher: TeacherStream | None,
    unit: Tensor,
    unit_t: Tensor | None,
    first: int,
    n: Tensor,
    block: Tensor,
) -> Tensor:
    """Return the lengths of the columns of some blocks, [E, BLOCK]; n counts from row first."""
    e = _block(student, n + first, block)
    if eager_gradient.keeps_d(student, stats):
        e.exp_()
    lengths = e * unit.to(e.dtype)[n, None]
    if teacher is not None and unit_t is not None:
        left = _block(teacher, n + first, block)
        ratio = (unit / unit_t).to(e.dtype)[n, None]  # of the sums: left is (q - p) sum exp(d_t)
        e_t = left.exp() if teacher.kd == "rkl+fkl" else left.addcmul_(e, ratio).clamp_(min=0)
        lengths += e_t * unit_t.to(e.dtype)[n, None]
    V = student.logits.shape[1]
    if V % BLOCK:  # what pads a row
        lengths.masked_fill_(block[:, None] * BLOCK + torch.arange(BLOCK, device=n.device) >= V, 0)
    return lengths


def _masses(stream: Stream, rows: slice) -> Tensor:
    """Return the sums of exp(d) of each block, [rows, blocks] in float64."""
    assert stream.masses is not None
    return stream.masses[rows].double()


def _block(stream: Stream, row: Tensor, block: Tensor) -> Tensor:
    """Copy blocks of what the sweep left in the place of the logits, [E, BLOCK]."""
    blocks = stream.logits.stride(0) // BLOCK
    memory = eager_gradient.flat(stream).view(-1, BLOCK)
    return memory.index_select(0, row * blocks + block)
