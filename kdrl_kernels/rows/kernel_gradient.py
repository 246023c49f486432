"""Writes dL/dlogits on Triton, one program per row. Maths: README.md."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl_kernels.rows.ids import normalizer_factor, rest_factor
from kdrl_kernels.rows.kernel_loads import load_a, temperatures_of, width_of
from kdrl_kernels.rows.kernel_math import (
    BOTH,
    FKL,
    JSD_CODE,
    KD_CODES,
    LN2,
    LOG2_E,
    OPTIONS,
    RKL,
    mixture_log2_ratios,
)
from kdrl_kernels.rows.streams import NUMBERS, Stats, Stream, TeacherStream
from kdrl_kernels.rows.tiles import GRADIENT, Tile, tile_of
from kdrl_kernels.token_rows import Coefficients


@triton.jit
def log2_teacher(t_ptr, v, row_ptr, V, width, C, t_softcap):
    """Load log2 q of a tile of the teacher's row."""
    top_t, log_s_t = tl.load(row_ptr + 4 * C), tl.load(row_ptr + 5 * C)
    k_t = LOG2_E / tl.load(row_ptr + 16 * C)
    return (load_a(t_ptr, v, V, width, t_softcap) - top_t) * k_t - log_s_t * LOG2_E


@triton.jit
def with_terms(
    dz, p, log2_p, log2_q, row_ptr, C, alpha, HAS_ENTROPY: tl.constexpr, KD: tl.constexpr
):
    """Add the terms of the entropy and of the divergence to dL/dz of a tile."""
    if HAS_ENTROPY:
        e = tl.load(row_ptr + 11 * C)
        surprise = log2_p * LN2 + tl.load(row_ptr + 3 * C)
        dz -= tl.where(p > 0, e * p * surprise, 0.0)
    if KD >= RKL:
        g = tl.load(row_ptr + 12 * C)
        if KD == FKL:
            dz += g * (p - tl.exp2(log2_q))
        elif KD == JSD_CODE:  # all of it is finite
            p_over_m, _ = mixture_log2_ratios(log2_p, log2_q, alpha)
            dz += (1 - alpha) * g * p * (p_over_m * LN2 - tl.load(row_ptr + 8 * C))
        else:
            pull = (log2_p - log2_q) * LN2 - tl.load(row_ptr + 7 * C)
            dz += tl.where(p > 0, tl.where(g == 0, 0.0, g * p * pull), 0.0)
        if KD == BOTH:
            dz += tl.load(row_ptr + 13 * C) * (p - tl.exp2(log2_q))
    return dz


@triton.jit
def _gradient_kernel(
    z_ptr, t_ptr, dz_ptr, token_ptr, source_ptr, row_ptr,
    stride_zn, stride_tn, stride_dn, V, width, C, softcap, t_softcap, alpha,
    HAS_ENTROPY: tl.constexpr, KD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dz[slot, v] = dL/dlogits of row n = source[slot]; record gives the rows of row_ptr.

    c 1[v = y] - (c - h) p_v - e p_v (log p_v + entropy) + g p_v (log p_v - log q_v - KL), or with
    + g (p_v - q_v), "fkl", or + g (1 - alpha) p_v (log p_v - log m_v - KL(p‖m)), "jsd"; all times
    dz/dlogits. h is the derivative in the log-sum-exp. "rkl+fkl" has the first and the second.
    """
    slot = tl.program_id(0).to(tl.int64)
    n = slot
    if source_ptr is not None:
        n = tl.load(source_ptr + slot)
        if n < 0:
            return
    z_ptr += n * stride_zn
    t_ptr += n * stride_tn
    dz_ptr += slot * stride_dn
    row_ptr += n
    y = tl.load(token_ptr + n)
    y = tl.where((y >= 0) & (y < V), y, -1).to(tl.int32)  # to compare 64 bits takes 3 instructions
    c, c_p = tl.load(row_ptr + 10 * C), tl.load(row_ptr + 14 * C)
    scale = 1 / tl.load(row_ptr + 15 * C)
    top, log2_s, k = tl.load(row_ptr), tl.load(row_ptr + C) * LOG2_E, scale * LOG2_E
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        a = load_a(z_ptr, v, V, width, softcap)
        log2_p = (a - top) * k - log2_s
        log2_q = log2_p
        if KD >= RKL:
            log2_q = log2_teacher(t_ptr, v, row_ptr, V, width, C, t_softcap)
        p = tl.exp2(log2_p)
        dz = tl.where(v == y, c, 0.0) - c_p * p
        dz = with_terms(dz, p, log2_p, log2_q, row_ptr, C, alpha, HAS_ENTROPY, KD)
        if softcap is not None:
            tanh = a * (1 / softcap)
            dz *= 1 - tanh * tanh
        dz *= scale
        # a 16-bit dz of block 0 lies over float32 logits of block 0 that other threads still read
        tl.debug_barrier()
        tl.store(dz_ptr + v, dz, mask=v < width)  # the only rounding of dz


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
    """Write dL/dlogits of row source[n] to out[n]; of row n where source is None.

    Slots with source -1 are not written. out [C, V] may be the student's memory, as it is or as a
    16-bit view: source[n] is n, or a row whose memory no slot of out covers.
    """
    if coef.kl is None:
        teacher = None
    tile = tile or tile_of(GRADIENT, student, teacher)
    C, V = student.logits.shape
    other = teacher or student
    strides = student.logits.stride(0), other.logits.stride(0), out.stride(0)
    if C:
        _gradient_kernel[(C,)](
            student.logits, other.logits, out, tokens, source,
            record(stats, coef, temperatures_of(student), temperatures_of(other)),
            *strides, V, width_of(V, *strides), C, student.softcap, other.softcap,
            teacher.jsd_alpha if teacher else 0.5, coef.entropy is not None,
            KD_CODES[teacher.kd if teacher else None], tile.columns, num_warps=tile.warps,
            **OPTIONS,
        )  # fmt: skip
    return out


def record(stats: Stats, coef: Coefficients, *more: Tensor) -> Tensor:
    """Stack numbers of stats and coef, the factor of -p, and more rows; a None is never read.

    more: the temperatures of student and teacher come first.
    """
    scale = normalizer_factor(coef)
    if coef.rest is not None:
        scale = scale - rest_factor(coef, stats.at_ids)
    derivatives = coef.logprobs, coef.entropy, coef.kl, coef.forward_kl, scale
    values = *(getattr(stats, name) for name in NUMBERS[:-1]), *derivatives
    filled = [stats.max if value is None else value for value in values]
    return torch.stack([*filled, *more])
