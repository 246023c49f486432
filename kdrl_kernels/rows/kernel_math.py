"""Holds what the Triton kernels share: constants, and functions of a tile. Maths: README.md."""

import triton
import triton.language as tl

OPTIONS = {"enable_fp_fusion": True}  # set, since its default changes between versions
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a start of the running maximum that is not -inf
LOWEST_LOG = tl.constexpr(-1e30)  # log2 of a probability that is 0, where -inf would make a NaN
LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
KD_CODES = {None: 0, "k2": 1, "k3": 2, "k3_ratio": 3, "rkl": 4}
KD_CODES |= {"rkl+fkl": 5, "fkl": 6, "jsd": 7}  # the pair between the two: both conditions hold
K2 = tl.constexpr(KD_CODES["k2"])
K3 = tl.constexpr(KD_CODES["k3"])
RKL = tl.constexpr(KD_CODES["rkl"])  # this code and those above it read the teacher's logits
FKL = tl.constexpr(KD_CODES["fkl"])
JSD_CODE = tl.constexpr(KD_CODES["jsd"])
BOTH = tl.constexpr(KD_CODES["rkl+fkl"])


@triton.jit
def capped(x, cap):
    """Compute cap · tanh(x / cap), to 6 · 2^-23 of it, however small: COST.md, "Instructions"."""
    s = x * (2 * LOG2_E / cap)
    w = s * s
    near = x * (
        1 + w * (-0.040037523 + w * (0.0019225504 + w * (-9.1922384e-05 + w * 3.5887115e-06)))
    )
    root = tl.rsqrt(1 + tl.exp2(tl.abs(s)))  # its square is 1 / (1 + exp(2 |x| / cap))
    far = cap - 2 * cap * (root * root)
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    far = (far.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(s) < LOG2_E, near, far)  # |x| < cap / 2


@triton.jit
def expm1(x):
    """Compute exp(x) - 1 without cancellation near 0."""
    tail = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))
    return tl.where(tl.abs(x) < 0.3, x * (1 + x * (0.5 + x * (1 / 6 + x * tail))), tl.exp(x) - 1)


@triton.jit
def _minus_log2(y):
    """Compute -log2(1 - y) without cancellation near 0, 0 <= y < 1.

    1 - y = 2^k (1 + m), -1/3 <= m < 1/3; tl.log2 takes 29 instructions, since it looks for inf, NaN
    and subnormal numbers, this 16.
    """
    bits = (1 - y).to(tl.int32, bitcast=True)
    whole = (bits - 0x3F2AAAAB) & -0x800000  # k · 2^23
    scale = (0x3F800000 - whole).to(tl.float32, bitcast=True)  # 2^-k
    m = (scale - 1) - scale * y
    tail = -0.23678653 + m * (0.20179914 + m * (-0.22222118 + m * 0.20278688))
    tail = -0.7213466 + m * (0.48089597 + m * (-0.36078957 + m * (0.28871134 + m * tail)))
    return whole.to(tl.float32) * -(2.0**-23) - m * (1.442695 + m * tail)


@triton.jit
def rescale(running, shift):
    """Compute running · exp2(shift): move a sum of exp2(d) to a maximum higher by -shift."""
    scale = tl.exp2(shift)
    return scale * tl.where(scale > 0, running, 0.0)  # a sum may be infinite: 0 · inf counts 0


@triton.jit
def expectation(e, values):
    """Sum e · values over dim 0, where 0 · inf counts 0."""
    return tl.sum(e * tl.where(e > 0, values, 0.0), axis=0)


@triton.jit
def mixture_log2_ratios(log2_p, log2_q, alpha):
    """Compute log2 p - log2 m and log2 q - log2 m, finite where p or q is 0; README: t."""
    log2_p = tl.maximum(log2_p, LOWEST_LOG, propagate_nan=tl.PropagateNan.ALL)
    log2_q = tl.maximum(log2_q, LOWEST_LOG, propagate_nan=tl.PropagateNan.ALL)
    ratio = log2_p - log2_q
    size = tl.abs(ratio)
    series = -0.24022564 + size * (0.055490408 + size * (-9.5412815e-3 + size * 1.1544522e-3))
    loss = tl.where(size < 0.5, size * (0.6931472 + size * series), 1 - tl.exp2(-size))
    t = _minus_log2(tl.where(ratio < 0, 1 - alpha, alpha) * loss)
    return t + tl.minimum(ratio, 0.0), t - tl.maximum(ratio, 0.0)
