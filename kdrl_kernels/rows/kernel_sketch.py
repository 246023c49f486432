"""Chooses the entries of a sketched gradient on Triton: one program per row, in one read of it.

Where a tile holds a whole number, positions in it are whole multiples of 2^-32 of a unit, in 64
bits: no interval is rounded away, however small. Where a tile begins is a rounded sum. That moves
intervals by an amount that no random number decides, so the chance of an entry stays its length.
Maths: SKETCH.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl_kernels.rows.entries import BLOCK, Entries, Grid, row_room
from kdrl_kernels.rows.kernel_gradient import log2_teacher, record, with_terms
from kdrl_kernels.rows.kernel_loads import load_a, temperatures_of, width_of
from kdrl_kernels.rows.kernel_math import (
    BOTH,
    JSD_CODE,
    KD_CODES,
    LN2,
    LOG2_E,
    OPTIONS,
    RKL,
)
from kdrl_kernels.rows.streams import Stats, Stream, TeacherStream
from kdrl_kernels.rows.tiles import SKETCH, Tile, tile_of
from kdrl_kernels.token_rows import Coefficients

UNIT = tl.constexpr(2.0**32)
BITS = tl.constexpr(32)
COLUMNS = tl.constexpr(BLOCK)


@triton.jit
def _sketch_kernel(
    z_ptr, t_ptr, row_ptr, begin_ptr, threshold_ptr, column_ptr, entry_ptr, count_ptr,
    stride_zn, stride_tn, V, width, C, slots, most_entries, softcap, t_softcap, alpha,
    HAS_ENTROPY: tl.constexpr, KD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the kept entries of row n to slots n · slots and on: column, chance, value, log p.

    An entry of length a / threshold is kept where its interval holds a whole number. Most tiles
    hold none: they cost their sums. The count of a flat row is -1.
    """
    n = tl.program_id(0).to(tl.int64)
    z_ptr += n * stride_zn
    t_ptr += n * stride_tn
    row_ptr += n
    place = n * slots
    per_unit = 1 / tl.load(threshold_ptr + n)
    position = tl.load(begin_ptr + n)
    c_p = tl.load(row_ptr + 14 * C)
    top, log2_s = tl.load(row_ptr), tl.load(row_ptr + C) * LOG2_E
    k = LOG2_E / tl.load(row_ptr + 15 * C)
    count, mean = 0, tl.zeros((BLOCK_V // COLUMNS,), tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        log2_p = (load_a(z_ptr, v, V, width, softcap) - top) * k - log2_s
        log2_q = log2_p
        p = tl.exp2(log2_p)
        length = p * per_unit
        if KD >= BOTH and KD != JSD_CODE:
            log2_q = log2_teacher(t_ptr, v, row_ptr, V, width, C, t_softcap)
            length = (p + tl.exp2(log2_q)) * (0.5 * per_unit)
        shares = tl.reshape(tl.minimum(length, 1.0), (BLOCK_V // COLUMNS, COLUMNS))
        mean += tl.sum(shares, axis=1)  # few registers
        tile = (tl.sum(length, axis=0) * UNIT).to(tl.int64)
        after = position + tile
        # the sum of the lengths as they are used below may be larger by their rounding
        if (after + (tile >> 16) + BLOCK_V) >> BITS > position >> BITS:  # perhaps a whole number
            if KD == RKL or KD == JSD_CODE:  # noqa: PLR1714, SIM109 (Triton has no `in`)
                log2_q = log2_teacher(t_ptr, v, row_ptr, V, width, C, t_softcap)
            units = (length * UNIT).to(tl.int64)
            ends = position + tl.cumsum(units, axis=0)
            kept = ends >> BITS > (ends - units) >> BITS
            chance = tl.where(kept, tl.minimum(length, 1.0), 1.0)
            dz = with_terms(-c_p * p, p, log2_p, log2_q, row_ptr, C, alpha, HAS_ENTROPY, KD)
            number = kept.to(tl.int32)
            slot = place + count + tl.cumsum(number, axis=0) - 1
            tl.store(column_ptr + slot, v, mask=kept)
            tl.store(entry_ptr + slot, chance, mask=kept)
            tl.store(entry_ptr + C * slots + slot, dz / chance, mask=kept)
            tl.store(entry_ptr + 2 * C * slots + slot, log2_p * LN2, mask=kept)
            count += tl.sum(number, axis=0)
        position = after
    flat = tl.sum(mean, axis=0) > most_entries
    tl.store(count_ptr + n, tl.where(flat, -1, count))


def sketch(
    student: Stream,
    stats: Stats,
    coef: Coefficients,
    grid: Grid,
    teacher: TeacherStream | None = None,
    tile: Tile | None = None,
) -> tuple[Entries, Tensor]:
    """Return the entries of dL/dz that are kept, and flat rows. Waits once for their number."""
    tile = tile or tile_of(SKETCH, student, teacher)
    C, V = student.logits.shape
    K = 0 if stats.at_ids is None else stats.at_ids.columns.shape[1]
    slots = row_room(V, grid.least, K)
    columns = torch.empty(C, slots, dtype=torch.int32, device=stats.max.device)
    entries = torch.empty(3, C, slots, dtype=torch.float32, device=stats.max.device)
    counts = torch.empty(C, dtype=torch.int32, device=stats.max.device)
    other = teacher or student
    strides = student.logits.stride(0), other.logits.stride(0)
    if C:
        _sketch_kernel[(C,)](
            student.logits, other.logits,
            record(stats, coef, temperatures_of(student), temperatures_of(other)),
            (grid.uniforms * 2.0**32).long(), grid.thresholds.float(), columns, entries, counts,
            *strides, V, width_of(V, *strides), C, slots, grid.most_entries, student.softcap,
            other.softcap, teacher.jsd_alpha if teacher else 0.5, coef.entropy is not None,
            KD_CODES[teacher.kd if teacher else None], tile.columns, num_warps=tile.warps,
            **OPTIONS,
        )  # fmt: skip
    used = torch.arange(slots, device=counts.device) < counts[:, None]
    place = used.view(-1).nonzero().squeeze(1)
    chance, value, logp = (part[place] for part in entries.view(3, -1))
    kept = Entries(place // slots, columns.view(-1)[place].long(), chance, value, logp)
    return kept, counts < 0


__all__ = ["sketch"]
