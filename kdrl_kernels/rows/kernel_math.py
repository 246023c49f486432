"""Holds what the Triton kernels share: constants, and functions of a tile. Maths: README.md."""

import triton
import triton.language as tl

OPTIONS = {"enable_fp_fusion": True}  # set, since its default changes between versions
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a start of the running maximum that is not -inf
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
def tanh(x):
    """Compute tanh to 2 ulp, by its series near 0, where 1 - exp(-2|x|) would cancel."""
    x2 = x * x
    series = x * (1 - x2 * (1 / 3 - x2 * (2 / 15 - x2 * (17 / 315 - x2 * (62 / 2835)))))
    decay = tl.exp(-2 * tl.abs(x))
    far = (1 - decay) / (1 + decay)
    return tl.where(x2 < 0.0625, series, tl.where(x < 0, -far, far))


@triton.jit
def expm1(x):
    """Compute exp(x) - 1 without cancellation near 0."""
    tail = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))
    return tl.where(tl.abs(x) < 0.3, x * (1 + x * (0.5 + x * (1 / 6 + x * tail))), tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    """Compute log(1 + x) without cancellation near 0, x > -1: log(u) x / (u - 1), u = 1 + x."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def rescale(running, shift):
    """Compute running · exp2(shift): move a sum of exp2(d) to a maximum higher by -shift."""
    scale = tl.exp2(shift)
    return tl.where(scale > 0, scale * running, 0.0)


@triton.jit
def expectation(e, values):
    """Sum e · values over dim 0, where 0 · inf counts 0."""
    return tl.sum(tl.where(e > 0, e * values, 0.0), axis=0)


@triton.jit
def mixture_log_ratio(log_ratio, alpha):
    """Compute t of log p - log m = t + min(l, 0), log q - log m = t - max(l, 0); l = log p/q."""
    share = tl.where(log_ratio < 0, 1 - alpha, alpha)
    return -_log1p(share * expm1(-tl.abs(log_ratio)))
