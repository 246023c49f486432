"""Row work on Triton: kernels and launchers, one program a row. Maths: README.md.

z = logits [C, V] of the student, t = those of the teacher, p and q their softmax. Logits are
float32; a 16-bit gradient is written over the row it came from.
"""

import math
from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl_kernels.objective import Objective, Rows
from kdrl_kernels.rows import Coefficients, Stats, Stream

BLOCK_BUFFERS = 0
SWEEP_BLOCK_V = 4096
PAIR_BLOCK_V = 2048  # two streams: 4096 columns take 128 registers, and spill on sm_100
GRADIENT_BLOCK_V = 2048
SOFTCAP_PAIR_BLOCK_V = 1024  # two streams and a softcap: 2048 spill on sm_90
OBJECTIVE_BLOCK = 256
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}  # fusion is said, since its default changes
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a start of the running maximum that is not -inf
KD_CODES = {None: 0, "k2": 1, "k3": 2, "rkl": 3, "fkl": 4}
K2 = tl.constexpr(KD_CODES["k2"])
RKL = tl.constexpr(KD_CODES["rkl"])  # this code and those above it read the teacher's logits


def block_rows(V: int, device: torch.device) -> int:  # noqa: ARG001 (interface of row modules)
    """No temporaries beside the logits."""
    return 0


def sweep_block(student: Stream, teacher: Stream | None) -> int:
    """Columns a block of the sweep: what leaves three blocks an SM and spills nothing."""
    if teacher is None:
        return SWEEP_BLOCK_V
    return SOFTCAP_PAIR_BLOCK_V if student.softcap or teacher.softcap else PAIR_BLOCK_V


def gradient_block(student: Stream, teacher: Stream | None) -> int:
    """Columns a block of the gradient, by the same rule."""
    softcap = teacher is not None and (student.softcap or teacher.softcap)
    return SOFTCAP_PAIR_BLOCK_V if softcap else GRADIENT_BLOCK_V


def activate_(stream: Stream) -> None:
    """Nothing: the kernels apply softcap and temperature to what they load."""


@triton.jit
def _tanh(x):
    """tanh to 2 ulp: its series near 0, where 1 - exp(-2|x|) would cancel."""
    x2 = x * x
    series = x * (1 - x2 * (1 / 3 - x2 * (2 / 15 - x2 * (17 / 315 - x2 * 62 / 2835))))
    decay = tl.exp(-2 * tl.abs(x))
    far = (1 - decay) / (1 + decay)
    return tl.where(x2 < 0.0625, series, tl.where(x < 0, -far, far))


@triton.jit
def _expm1(x):
    """exp(x) - 1 without cancellation near 0."""
    tail = 1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))
    return tl.where(tl.abs(x) < 0.3, x * (1 + x / 2 * (1 + x / 3 * tail)), tl.exp(x) - 1)


@triton.jit
def _activate(logits, temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    """z = softcap · tanh(logits / softcap) / temperature."""
    if HAS_SOFTCAP:
        logits = softcap * _tanh(logits / softcap)
    return tl.math.div_rn(logits, temperature)


@triton.jit
def _load_z(row_ptr, v, V, temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    """[BLOCK_V] z, -inf from V on."""
    logits = tl.load(row_ptr + v, mask=v < V, other=0.0)
    return tl.where(v < V, _activate(logits, temperature, softcap, HAS_SOFTCAP), float("-inf"))


@triton.jit
def _expectation(e, values):
    """sum_v e[v] · values[v], where 0 · inf counts 0."""
    return tl.sum(tl.where(e > 0, e * values, 0.0), axis=0)


@triton.jit
def _rescale(running, shift):
    """running · exp(shift): an accumulator of exp(z - m) moved to a maximum higher by -shift."""
    scale = tl.exp(shift)
    return tl.where(scale > 0, scale * running, 0.0)


@triton.jit
def _sweep_kernel(
    z_ptr, t_ptr, token_ptr, temperature_ptr, t_temperature_ptr, stats_ptr,
    stride_zn, stride_tn, V, C, softcap, t_softcap,
    HAS_SOFTCAP: tl.constexpr, T_HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    KD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """stats[:, n] = Stats in the order of its fields, in one read of each stream.

    d = z - max z, s = sum_v exp(d), and for the teacher d_t, s_t:
    entropy = log s - sum_v exp(d) d / s;  KL(p‖q) = sum_v exp(d) (d - d_t) / s - log s + log s_t.
    """
    n = tl.program_id(0).to(tl.int64)  # n · stride passes 2**31 at real vocabulary sizes
    z_ptr += n * stride_zn
    t_ptr += n * stride_tn
    stats_ptr += n
    y = tl.load(token_ptr + n)
    temperature = tl.load(temperature_ptr + n)
    t_temperature = tl.load(t_temperature_ptr + n)
    top = tl.full((), LOWEST, tl.float32)
    top_t = tl.full((), LOWEST, tl.float32)
    s, surprise, s_t, gap = 0.0, 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = _load_z(z_ptr, v, V, temperature, softcap, HAS_SOFTCAP)
        new_top = tl.maximum(top, tl.max(z, axis=0))
        shift, d = top - new_top, z - new_top
        e = tl.exp(d)
        if HAS_ENTROPY:
            surprise = _rescale(surprise + s * shift, shift) + _expectation(e, d)
        if KD >= RKL:
            t = _load_z(t_ptr, v, V, t_temperature, t_softcap, T_HAS_SOFTCAP)
            new_top_t = tl.maximum(top_t, tl.max(t, axis=0))
            shift_t, d_t = top_t - new_top_t, t - new_top_t
            e_t = tl.exp(d_t)
            if KD == RKL:
                gap = _rescale(gap + s * (shift - shift_t), shift) + _expectation(e, d - d_t)
            else:
                gap = _rescale(gap + s_t * (shift_t - shift), shift_t) + _expectation(e_t, d_t - d)
            s_t = _rescale(s_t, shift_t) + tl.sum(e_t, axis=0)
            top_t = new_top_t
        s = _rescale(s, shift) + tl.sum(e, axis=0)
        top = new_top
    log_s = tl.log(s)
    z_y = _activate(tl.load(z_ptr + y), temperature, softcap, HAS_SOFTCAP)
    tl.store(stats_ptr, top)
    tl.store(stats_ptr + C, log_s)
    tl.store(stats_ptr + 2 * C, z_y - top - log_s)
    if HAS_ENTROPY:
        tl.store(stats_ptr + 3 * C, log_s - surprise / s)
    if KD >= RKL:
        log_s_t = tl.log(s_t)
        t_y = _activate(tl.load(t_ptr + y), t_temperature, t_softcap, T_HAS_SOFTCAP)
        tl.store(stats_ptr + 4 * C, top_t)
        tl.store(stats_ptr + 5 * C, log_s_t)
        tl.store(stats_ptr + 6 * C, t_y - top_t - log_s_t)
        if KD == RKL:
            tl.store(stats_ptr + 7 * C, gap / s + (log_s_t - log_s))
        else:
            tl.store(stats_ptr + 7 * C, gap / s_t + (log_s - log_s_t))


def sweep(
    student: Stream,
    tokens: Tensor,
    *,
    teacher: Stream | None = None,
    kd: str | None = None,
    entropy: bool = False,
    BLOCK_V: int | None = None,
) -> Stats:
    """Statistics of one stream, or of two with their exact KL."""
    BLOCK_V = BLOCK_V or sweep_block(student, teacher)
    C, V = student.logits.shape
    other = teacher or student
    found = torch.empty(8, C, device=tokens.device, dtype=torch.float32)
    if C:
        _sweep_kernel[(C,)](
            student.logits, other.logits, tokens, _temperatures(student), _temperatures(other),
            found, student.logits.stride(0), other.logits.stride(0), V, C,
            float(student.softcap or 1), float(other.softcap or 1),
            student.softcap is not None, other.softcap is not None, entropy,
            KD_CODES[kd if teacher else None], BLOCK_V, **OPTIONS,
        )  # fmt: skip
    top, log_sum, logprobs, entropies, *rest = found
    return Stats(top, log_sum, logprobs, entropies if entropy else None, *(rest if teacher else []))


@triton.jit
def _objective_kernel(
    lp_ptr, old_ptr, advantage_ptr, kd_weight_ptr, lq_ptr, kl_ptr, entropy_ptr, weight_ptr, out_ptr,
    C, log_high, log_low, log_dual, log_cap, kd_coef, entropy_coef,
    HAS_POLICY: tl.constexpr, KD: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[:, n] = loss, dloss/dlp, dloss/dentropy, dloss/dKL: token_losses of objective.py."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < C
    lp = tl.load(lp_ptr + n, mask=mask, other=0.0)
    log_ratio = lp - tl.load(old_ptr + n, mask=mask, other=0.0)
    loss, c, g = tl.zeros_like(lp), tl.zeros_like(lp), tl.zeros_like(lp)
    if HAS_POLICY:  # comparisons, not minimum and maximum: those would lose a NaN
        a = tl.load(advantage_ptr + n, mask=mask, other=0.0)
        upper = tl.where(a > 0, log_high, log_dual)
        lower = tl.where(a < 0, log_low, float("-inf"))
        bounded = tl.where(log_ratio > upper, upper, tl.where(log_ratio < lower, lower, log_ratio))
        surrogate = a * tl.exp(tl.where(a == 0, 0.0, bounded))
        loss -= surrogate
        c -= tl.where((log_ratio > upper) | (log_ratio < lower) | (a == 0), 0.0, surrogate)
    if KD != 0:
        scale = kd_coef * tl.exp(tl.where(log_ratio > log_cap, log_cap, log_ratio))
        scale *= tl.load(kd_weight_ptr + n, mask=mask, other=0.0)
        if KD >= RKL:
            kl = tl.load(kl_ptr + n, mask=mask, other=0.0)
            loss += scale * tl.where(scale == 0, 0.0, kl)
            g += scale
        else:
            lq = tl.load(lq_ptr + n, mask=mask, other=0.0)
            gap = tl.where(scale == 0, 0.0, lp - lq)
            if KD == K2:
                loss += scale * gap * gap / 2
                c += scale * gap
            else:
                loss += scale * (_expm1(-gap) + gap)
                c -= scale * _expm1(-gap)
    if HAS_ENTROPY:
        loss -= entropy_coef * tl.load(entropy_ptr + n, mask=mask, other=0.0)
    w = tl.load(weight_ptr + n, mask=mask, other=0.0)
    tl.store(out_ptr + n, w * loss, mask=mask)
    tl.store(out_ptr + C + n, w * c, mask=mask)
    tl.store(out_ptr + 2 * C + n, -w * entropy_coef, mask=mask)
    tl.store(out_ptr + 3 * C + n, w * g, mask=mask)


def coefficients(
    objective: Objective, rows: Rows, weights: Tensor, BLOCK: int = OBJECTIVE_BLOCK
) -> tuple[Tensor, Coefficients]:
    """([C] weighted losses, their derivatives)."""
    C, lp = len(weights), rows.logprobs
    out = torch.empty(4, C, device=lp.device, dtype=torch.float32)
    high, low, dual = objective.log_ratio_bounds
    cap = math.inf if rows.old_logprobs is None else math.log(objective.kd_ratio_cap)
    kd_weight = torch.ones_like(lp) if rows.kd_weight is None else rows.kd_weight
    given = (rows.old_logprobs, rows.advantages, rows.teacher_logprobs, rows.kl, rows.entropy)
    # lp stands for what is missing: old = lp is a ratio of 1, the rest is never read
    old, advantages, lq, kl, entropy = (lp if x is None else x for x in given)
    if C:
        _objective_kernel[(triton.cdiv(C, BLOCK),)](
            lp, old, advantages, kd_weight, lq, kl, entropy, weights, out, C, high, low, dual, cap,
            float(objective.kd_coef), float(objective.entropy_coef), objective.policy != "off",
            KD_CODES[objective.kd], objective.entropy_coef != 0, BLOCK, **OPTIONS,
        )  # fmt: skip
    return out[0], Coefficients(
        logprobs=out[1],
        entropy=out[2] if objective.entropy_coef else None,
        kl=None if rows.kl is None else out[3],
    )


@triton.jit
def _gradient_kernel(
    z_ptr, t_ptr, dz_ptr, token_ptr, temperature_ptr, t_temperature_ptr, stats_ptr, coef_ptr,
    stride_zn, stride_tn, stride_dn, V, C, softcap, t_softcap,
    HAS_SOFTCAP: tl.constexpr, T_HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    KD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dz[n, v] = dL/dlogits, over the row's own logits; c, e, g = coef[:, n].

    c (1[v = y] - p_v) - e p_v (log p_v + entropy) + g p_v (log p_v - log q_v - KL), or for the
    forward KL + g (p_v - q_v); all times dz/dlogits.
    """
    n = tl.program_id(0).to(tl.int64)
    z_ptr += n * stride_zn
    t_ptr += n * stride_tn
    dz_ptr += n * stride_dn
    stats_ptr += n
    coef_ptr += n
    y = tl.load(token_ptr + n)
    temperature = tl.load(temperature_ptr + n)
    t_temperature = tl.load(t_temperature_ptr + n)
    top, log_s = tl.load(stats_ptr), tl.load(stats_ptr + C)
    c = tl.load(coef_ptr)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = _load_z(z_ptr, v, V, temperature, softcap, HAS_SOFTCAP)
        logp = z - top - log_s
        p = tl.exp(logp)
        dz = tl.where(v == y, c, 0.0) - c * p
        if HAS_ENTROPY:
            e = tl.load(coef_ptr + C)
            dz -= tl.where(p > 0, e * p * (logp + tl.load(stats_ptr + 3 * C)), 0.0)
        if KD >= RKL:
            g = tl.load(coef_ptr + 2 * C)
            t = _load_z(t_ptr, v, V, t_temperature, t_softcap, T_HAS_SOFTCAP)
            logq = t - tl.load(stats_ptr + 4 * C) - tl.load(stats_ptr + 5 * C)
            if KD == RKL:
                pull = logp - logq - tl.load(stats_ptr + 7 * C)
                dz += tl.where(p > 0, tl.where(g == 0, 0.0, g * p * pull), 0.0)
            else:
                dz += g * (p - tl.exp(logq))
        if HAS_SOFTCAP:
            tanh = z * temperature / softcap
            dz *= 1 - tanh * tanh
        dz = tl.math.div_rn(dz, temperature)
        # a 16-bit dz of block 0 lies over float32 logits of block 0 that other threads still read
        tl.debug_barrier()
        tl.store(dz_ptr + v, dz, mask=v < V)  # the only rounding of dz


def gradient_(
    student: Stream,
    tokens: Tensor,
    stats: Stats,
    coef: Coefficients,
    *,
    dtype: torch.dtype,
    teacher: Stream | None = None,
    kd: str | None = None,
    BLOCK_V: int | None = None,
) -> Tensor:
    """dL/dlogits [C, V] in dtype, written over the student's logits."""
    BLOCK_V = BLOCK_V or gradient_block(student, teacher)
    z = student.logits
    C, V = z.shape
    other = teacher or student
    out = z if z.dtype == dtype else z.view(dtype)[:, :V]
    if C:
        _gradient_kernel[(C,)](
            z, other.logits, out, tokens, _temperatures(student), _temperatures(other),
            _stack(stats), _stack(coef), z.stride(0), other.logits.stride(0), out.stride(0), V, C,
            float(student.softcap or 1), float(other.softcap or 1),
            student.softcap is not None, other.softcap is not None, coef.entropy is not None,
            KD_CODES[kd if coef.kl is not None else None], BLOCK_V, **OPTIONS,
        )  # fmt: skip
    return out


def _temperatures(stream: Stream) -> Tensor:
    """[C] float32."""
    logits, temperature = stream.logits, stream.temperature
    if isinstance(temperature, Tensor):
        return temperature.to(logits.dtype).contiguous()
    return torch.full((len(logits),), temperature, dtype=logits.dtype, device=logits.device)


def _stack(record: Stats | Coefficients) -> Tensor:
    """[fields, C] of a record of [C] tensors; a missing one is never read."""
    values = [getattr(record, field.name) for field in fields(record)]
    return torch.stack([values[0] if value is None else value for value in values])
