"""Writes dL/dlogits on Triton, also at K ids of each row. Maths: README.md."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl_kernels.rows import kernel_gradient
from kdrl_kernels.rows.ids import normalizer_factor
from kdrl_kernels.rows.kernel_gradient import record, with_terms
from kdrl_kernels.rows.kernel_loads import temperatures_of
from kdrl_kernels.rows.kernel_math import KD_CODES, LOG2_E, OPTIONS
from kdrl_kernels.rows.streams import Stats, Stream, TeacherStream
from kdrl_kernels.rows.tiles import Tile
from kdrl_kernels.token_rows import Coefficients

TILE = 8
"""Ids that are compared with all ids of a row at a time."""


@triton.jit
def _ids_kernel(
    dz_ptr, id_ptr, lp_ptr, lq_ptr, extra_ptr, token_ptr, source_ptr, row_ptr,
    stride_dn, C, K, softcap, alpha,
    HAS_ENTROPY: tl.constexpr, KD: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dz[slot, v] = dL/dlogits of row n = source[slot] at each of its ids v.

    As _gradient_kernel, which has written other numbers there, with + sum of the derivatives at
    ids equal to v. Row 17 of row_ptr is the factor of -p_v. Ids of -1 are left out.
    """
    slot = tl.program_id(0).to(tl.int64)
    n = slot
    if source_ptr is not None:
        n = tl.load(source_ptr + slot)
        if n < 0:
            return
    row_ptr += n
    first = n * K
    k = tl.arange(0, BLOCK_K)
    v = tl.load(id_ptr + first + k, mask=k < K, other=-1)
    hits = tl.where(v == tl.load(token_ptr + n), tl.load(row_ptr + 10 * C), 0.0)
    for start in range(0, K, TILE):
        j = start + tl.arange(0, TILE)
        other = tl.load(id_ptr + first + j, mask=j < K, other=-1)
        extra = tl.load(extra_ptr + first + j, mask=j < K, other=0.0)
        hits += tl.sum(tl.where(v[:, None] == other[None, :], extra[None, :], 0.0), axis=1)
    lp = tl.load(lp_ptr + first + k, mask=k < K, other=0.0)
    log2_p = lp * LOG2_E
    log2_q = tl.load(lq_ptr + first + k, mask=k < K, other=0.0) * LOG2_E
    p = tl.exp2(log2_p)
    dz = hits - tl.load(row_ptr + 17 * C) * p
    dz = with_terms(dz, p, log2_p, log2_q, row_ptr, C, alpha, HAS_ENTROPY, KD)
    temperature = tl.load(row_ptr + 15 * C)
    if softcap is not None:
        a = (lp + tl.load(row_ptr + C)) * temperature + tl.load(row_ptr)
        tanh = a * (1 / softcap)
        dz *= 1 - tanh * tanh
    tl.store(dz_ptr + slot * stride_dn + v, dz * (1 / temperature), mask=v >= 0)


def gradient(
    student: Stream,
    tokens: Tensor,
    stats: Stats,
    coef: Coefficients,
    *,
    out: Tensor,
    teacher: TeacherStream | None = None,
    source: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Write dL/dlogits as kernel_gradient.gradient does, and what else there is at the ids."""
    kernel_gradient.gradient(
        student, tokens, stats, coef, out=out, teacher=teacher, source=source, tile=tile
    )
    ids, extra = stats.at_ids, coef.extra
    if ids is None or not coef.reads_ids or len(tokens) == 0:
        return out
    teacher = None if coef.kl is None else teacher
    temperatures = temperatures_of(student), temperatures_of(teacher or student)
    lq = ids.logprobs if ids.teacher_logprobs is None else ids.teacher_logprobs
    C, K = ids.columns.shape
    block = max(16, triton.next_power_of_2(K))
    _ids_kernel[(C,)](
        out, ids.columns, ids.logprobs, lq,
        torch.zeros_like(ids.logprobs) if extra is None else extra.contiguous(), tokens, source,
        record(stats, coef, *temperatures, normalizer_factor(coef)), out.stride(0), C, K,
        student.softcap, teacher.jsd_alpha if teacher else 0.5, coef.entropy is not None,
        KD_CODES[teacher.kd if teacher else None], block, TILE, num_warps=max(1, block // 64),
        **OPTIONS,
    )  # fmt: skip
    return out
