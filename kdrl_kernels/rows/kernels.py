"""Does the row work on Triton: kernels and launchers, one program per row. Maths: README.md.

a = softcap(logits) [C, V], d = (a - max a) / temperature; the same of the teacher with _t. Logits
are float32. Kernels keep d in units of log 2, so that an exponential is one exp2.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl_kernels.rows.blocks import row_blocks
from kdrl_kernels.rows.ids import IdStats, filled, log_mass
from kdrl_kernels.rows.kernel_compaction import slots
from kdrl_kernels.rows.kernel_ids import gradient
from kdrl_kernels.rows.kernel_loads import load_a, temperatures_of, width_of
from kdrl_kernels.rows.kernel_math import (
    BOTH,
    FKL,
    JSD_CODE,
    KD_CODES,
    LN2,
    LOG2_E,
    LOWEST,
    OPTIONS,
    RKL,
    expectation,
    mixture_log2_ratios,
    rescale,
)
from kdrl_kernels.rows.kernel_objective import coefficients
from kdrl_kernels.rows.streams import NUMBERS, Stats, Stream, TeacherStream
from kdrl_kernels.rows.tiles import JSD, SWEEP, Tile, tile_of

__all__ = [
    "BLOCK_BUFFERS",
    "block_rows",
    "coefficients",
    "gradient",
    "mixture_kl",
    "resume_",
    "slots",
    "sweep",
]

BLOCK_BUFFERS = 0
BLOCK = 0  # sweeps write no masses
STATS = len(NUMBERS)


def block_rows(V: int, device: torch.device) -> int:  # noqa: ARG001 (interface of row modules)
    """Return 0: this row work has no temporaries besides the logits."""
    return 0


def resume_(stream: Stream, stats: Stats) -> None:
    """Do nothing: the kernels leave logits as they are."""


@triton.jit
def _step(row_ptr, v, V, width, top, k, softcap):
    """Return new top, shift to it, d, exp2(d) of a tile [DEPTH, LANES]; d, shift in log 2."""
    a = load_a(row_ptr, v, V, width, softcap)
    new_top = tl.maximum(top, tl.max(a, axis=0))
    d = (a - new_top[None, :]) * k
    return new_top, (top - new_top) * k, d, tl.exp2(d)


@triton.jit
def _finish(row_ptr, stats_ptr, y, C, V, top, s, k, softcap):
    """Store max, log sum, log-probability; return each lane's shift to the row's top, and s."""
    row_top = tl.max(top, axis=0)
    shift = (top - row_top) * k
    row_s = tl.sum(rescale(s, shift), axis=0)
    a_y = load_a(row_ptr, y, V, V, softcap)
    tl.store(stats_ptr, row_top)
    tl.store(stats_ptr + C, tl.log(row_s))
    tl.store(stats_ptr + 2 * C, (a_y - row_top) * k * LN2 - tl.log(row_s))
    return shift, row_s


@triton.jit
def _store_entropy(place_ptr, surprise, s, shift, row_s):
    """Store log s - sum_v exp(d) d / s of the joined lanes."""
    row_surprise = tl.sum(rescale(surprise + s * shift, shift), axis=0)
    tl.store(place_ptr, tl.log(row_s) - row_surprise * LN2 / row_s)


@triton.jit
def _sweep_kernel(
    z_ptr, t_ptr, token_ptr, temperature_ptr, stats_ptr,
    stride_zn, stride_tn, V, width, C, softcap, t_softcap,
    HAS_ENTROPY: tl.constexpr, TEACHER_ENTROPY: tl.constexpr, KD: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """stats[:, n] = Stats in the order of its fields, in one read of each stream.

    s = sum_v exp(d), entropy = log s - sum_v exp(d) d / s, and for the teacher d_t, s_t:
    KL(p‖q) = sum_v exp(d) (d - d_t) / s - log s + log s_t; KL(q‖p) with the streams exchanged.
    Each of LANES columns keeps a maximum and sums over [DEPTH, LANES] tiles, so that the loop has
    no barrier; the lanes are joined after it.
    """
    n = tl.program_id(0).to(tl.int64)  # n · stride passes 2**31 at real vocabulary sizes
    z_ptr += n * stride_zn
    t_ptr += n * stride_tn
    stats_ptr += n
    y = tl.load(token_ptr + n)
    k = LOG2_E / tl.load(temperature_ptr + n)
    k_t = LOG2_E / tl.load(temperature_ptr + C + n)
    columns = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top = tl.full((LANES,), LOWEST, tl.float32)
    top_t = tl.full((LANES,), LOWEST, tl.float32)
    s, surprise = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    s_t, divergence = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    forward, surprise_t = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for start in range(0, V, DEPTH * LANES):
        v = start + columns
        top, shift, d, e = _step(z_ptr, v, V, width, top, k, softcap)
        if HAS_ENTROPY:
            surprise = rescale(surprise + s * shift, shift) + expectation(e, d)
        if KD >= RKL:
            top_t, shift_t, d_t, e_t = _step(t_ptr, v, V, width, top_t, k_t, t_softcap)
            if TEACHER_ENTROPY:
                surprise_t = rescale(surprise_t + s_t * shift_t, shift_t) + expectation(e_t, d_t)
            if KD <= BOTH:
                divergence = rescale(divergence + s * (shift - shift_t), shift)
                divergence += expectation(e, d - d_t)
            if KD >= BOTH and KD != JSD_CODE:
                forward = rescale(forward + s_t * (shift_t - shift), shift_t)
                forward += expectation(e_t, d_t - d)
            s_t = rescale(s_t, shift_t) + tl.sum(e_t, axis=0)
        s = rescale(s, shift) + tl.sum(e, axis=0)
    shift, row_s = _finish(z_ptr, stats_ptr, y, C, V, top, s, k, softcap)
    if HAS_ENTROPY:
        _store_entropy(stats_ptr + 3 * C, surprise, s, shift, row_s)
    if KD >= RKL:
        stats_t_ptr = stats_ptr + 4 * C
        shift_t, row_s_t = _finish(t_ptr, stats_t_ptr, y, C, V, top_t, s_t, k_t, t_softcap)
        if TEACHER_ENTROPY:
            _store_entropy(stats_ptr + 10 * C, surprise_t, s_t, shift_t, row_s_t)
        log_s_ratio = tl.log(row_s_t) - tl.log(row_s)
        if KD <= BOTH:
            row_divergence = tl.sum(rescale(divergence + s * (shift - shift_t), shift), axis=0)
            tl.store(stats_ptr + 7 * C, row_divergence * LN2 / row_s + log_s_ratio)
        if KD >= BOTH and KD != JSD_CODE:
            row_forward = tl.sum(rescale(forward + s_t * (shift_t - shift), shift_t), axis=0)
            place: tl.constexpr = 7 if KD == FKL else 9
            tl.store(stats_ptr + place * C, row_forward * LN2 / row_s_t - log_s_ratio)


@triton.jit
def _jsd_kernel(
    z_ptr, t_ptr, temperature_ptr, stats_ptr,
    stride_zn, stride_tn, V, width, C, softcap, t_softcap, alpha, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """stats[7:9, n] = alpha KL(q‖m) + (1 - alpha) KL(p‖m), KL(p‖m); m = alpha q + (1 - alpha) p."""
    n = tl.program_id(0).to(tl.int64)
    z_ptr += n * stride_zn
    t_ptr += n * stride_tn
    stats_ptr += n
    k, k_t = LOG2_E / tl.load(temperature_ptr + n), LOG2_E / tl.load(temperature_ptr + C + n)
    top, log2_s = tl.load(stats_ptr), tl.load(stats_ptr + C) * LOG2_E
    top_t, log2_s_t = tl.load(stats_ptr + 4 * C), tl.load(stats_ptr + 5 * C) * LOG2_E
    p_kl, q_kl = tl.zeros((BLOCK_V,), tl.float32), tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        log2_p = (load_a(z_ptr, v, V, width, softcap) - top) * k - log2_s
        log2_q = (load_a(t_ptr, v, V, width, t_softcap) - top_t) * k_t - log2_s_t
        p_over_m, q_over_m = mixture_log2_ratios(log2_p, log2_q, alpha)
        p_kl += tl.exp2(log2_p) * p_over_m
        q_kl += tl.exp2(log2_q) * q_over_m
    mixture_kl = tl.sum(p_kl, axis=0) * LN2
    tl.store(stats_ptr + 7 * C, alpha * (tl.sum(q_kl, axis=0) * LN2) + (1 - alpha) * mixture_kl)
    tl.store(stats_ptr + 8 * C, mixture_kl)


def sweep(
    student: Stream,
    tokens: Tensor,
    *,
    teacher: TeacherStream | None = None,
    entropy: bool = False,
    ids: Tensor | None = None,
    rest: bool = False,
    tile: Tile | None = None,
) -> Stats:
    """Compute statistics of one stream, or of two and their divergence.

    ids: [C, K] columns whose log-probabilities are computed too; rest: and that of all others.
    """
    kd, teacher_entropy = (teacher.kd, teacher.entropy) if teacher else (None, False)
    tile = tile or tile_of(SWEEP, student, teacher)
    C, V = student.logits.shape
    other = teacher or student
    stats = torch.empty(STATS, C, device=tokens.device, dtype=torch.float32)
    temperatures = torch.stack([temperatures_of(student), temperatures_of(other)])
    strides = student.logits.stride(0), other.logits.stride(0)
    sizes = V, width_of(V, *strides), C
    if C:
        _sweep_kernel[(C,)](
            student.logits, other.logits, tokens, temperatures, stats, *strides, *sizes,
            student.softcap, other.softcap, entropy, teacher_entropy, KD_CODES[kd], tile.depth,
            tile.lanes, num_warps=tile.warps, **OPTIONS,
        )  # fmt: skip
    if teacher is not None and kd == "jsd":
        add_mixture_kl(student, teacher, temperatures, stats)
    top, log_sum, logprobs, entropies, *of_teacher, mixture_kl, forward_kl, t_entropies = stats
    numbers = Stats(
        *(top, log_sum, logprobs, entropies if entropy else None),
        *(of_teacher if teacher else [None] * len(of_teacher)),
        mixture_kl=mixture_kl if kd == "jsd" else None,
        forward_kl=forward_kl if kd == "rkl+fkl" else None,
        teacher_entropy=t_entropies if teacher_entropy else None,
    )
    if ids is None:
        return numbers
    return replace(numbers, at_ids=_at_ids(student, tokens, numbers, teacher, ids, rest))


def _at_ids(
    student: Stream,
    tokens: Tensor,
    stats: Stats,
    teacher: TeacherStream | None,
    ids: Tensor,
    rest: bool,
) -> IdStats:
    """Return log-probabilities at the ids [C, K] of each row, and of the rest, after a sweep."""
    columns, none = filled(ids, tokens), ids < 0
    lp = _logprobs(student, columns, stats.max, stats.log_sum).masked_fill(none, 0)
    lq, others = None, None
    if teacher is not None:
        assert stats.teacher_max is not None
        assert stats.teacher_log_sum is not None
        lq = _logprobs(teacher, columns, stats.teacher_max, stats.teacher_log_sum)
        lq = lq.masked_fill(none, 0)
    if rest:
        top, log_sum = _sweep_others(student, tokens, columns)
        others = (top - stats.max) / student.temperature + (log_sum - stats.log_sum)
        others = log_mass(others.to(lp.dtype)).masked_fill(none.all(dim=1), 0)
    return IdStats(ids, lp, lq, others)


def _logprobs(stream: Stream, columns: Tensor, top: Tensor, log_sum: Tensor) -> Tensor:
    """Return log-probabilities at columns [C, K] of logits as the GEMM left them."""
    d = _capped(stream.logits.gather(1, columns), stream.softcap) - top[:, None]
    return d / temperatures_of(stream)[:, None] - log_sum[:, None]


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _sweep_others(student: Stream, tokens: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return max and log sum [C] of each row without its columns [C, K], by a sweep of its own.

    1 minus the share of the columns would cancel where it is near 1.
    """
    logits, temperature = student.logits, temperatures_of(student)
    if student.softcap is None:
        saved = logits.gather(1, columns)
        stats = sweep(replace(student, logits=logits.scatter_(1, columns, -torch.inf)), tokens)
        logits.scatter_(1, columns, saved)
        return stats.max, stats.log_sum
    parts = []
    for rows in row_blocks(len(tokens), logits):  # a softcap would make -inf finite: capped before
        others = _capped(logits[rows], student.softcap).scatter_(1, columns[rows], -torch.inf)
        parts.append(sweep(Stream(others, temperature[rows], None), tokens[rows]))
    return torch.cat([part.max for part in parts]), torch.cat([part.log_sum for part in parts])


def add_mixture_kl(
    student: Stream,
    teacher: TeacherStream,
    temperatures: Tensor,
    stats: Tensor,
    tile: Tile | None = None,
) -> None:
    """Write the rows of stats [STATS, C] that a sweep over both streams left to "jsd"."""
    tile = tile or tile_of(JSD, student, teacher)
    C, V = student.logits.shape
    strides = student.logits.stride(0), teacher.logits.stride(0)
    if C:
        _jsd_kernel[(C,)](
            student.logits, teacher.logits, temperatures, stats, *strides, V, width_of(V, *strides),
            C, student.softcap, teacher.softcap, teacher.jsd_alpha, tile.columns,
            num_warps=tile.warps, **OPTIONS,
        )  # fmt: skip


def mixture_kl(student: Stream, teacher: TeacherStream, stats: Stats) -> tuple[Tensor, Tensor]:
    """Return what these columns add to "jsd" and to KL(p‖m), [C] each, of sums in stats."""
    values = (getattr(stats, name) for name in NUMBERS)
    table = torch.stack([stats.max if value is None else value for value in values])
    temperatures = torch.stack([temperatures_of(student), temperatures_of(teacher)])
    add_mixture_kl(student, teacher, temperatures, table)
    return table[7], table[8]
