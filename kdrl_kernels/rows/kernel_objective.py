"""Computes each row's loss and its derivatives on Triton: token_losses of objective.py, fused."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdrl_kernels.caller_loss import TokenLoss
from kdrl_kernels.caller_loss import coefficients as autograd_coefficients
from kdrl_kernels.objective import Objective
from kdrl_kernels.rows.kernel_math import K2, K3, KD_CODES, OPTIONS, RKL, expm1
from kdrl_kernels.rows.tiles import OBJECTIVE_BLOCK
from kdrl_kernels.token_rows import Coefficients, Rows


@triton.jit
def _subtract(logprobs, other):
    """Compute logprobs - other, 0 where both are -inf."""
    return tl.where(logprobs == other, 0.0, logprobs - other)


@triton.jit
def _objective_kernel(
    lp_ptr, old_ptr, advantage_ptr, kd_weight_ptr, lq_ptr, kl_ptr, entropy_ptr, weight_ptr, out_ptr,
    C, log_high, log_low, log_dual, log_cap, k3_bound, kd_coef, entropy_coef,
    HAS_POLICY: tl.constexpr, KD: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[:, n] = loss, dloss/dlp, dloss/dentropy, dloss/dKL: token_losses of objective.py."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < C
    lp = tl.load(lp_ptr + n, mask=mask, other=0.0)
    log_ratio = _subtract(lp, tl.load(old_ptr + n, mask=mask, other=0.0))
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
            teacher_log_ratio = tl.where(scale == 0, 0.0, _subtract(lp, lq))
            if KD == K2:
                loss += scale * teacher_log_ratio * teacher_log_ratio / 2
            else:
                bounded = tl.where(-teacher_log_ratio > k3_bound, k3_bound, -teacher_log_ratio)
                beyond = tl.where(-teacher_log_ratio > k3_bound, -teacher_log_ratio - k3_bound, 0.0)
                slope = expm1(bounded)
                loss += scale * (slope - bounded + slope * beyond)
            if KD == K3:
                c -= scale * slope
            else:
                c += scale * teacher_log_ratio
    if HAS_ENTROPY:
        loss -= entropy_coef * tl.load(entropy_ptr + n, mask=mask, other=0.0)
    w = tl.load(weight_ptr + n, mask=mask, other=0.0)
    tl.store(out_ptr + n, w * loss, mask=mask)
    tl.store(out_ptr + C + n, w * c, mask=mask)
    tl.store(out_ptr + 2 * C + n, -w * entropy_coef, mask=mask)
    tl.store(out_ptr + 3 * C + n, w * g, mask=mask)


def coefficients(
    loss: TokenLoss, rows: Rows, weights: Tensor, BLOCK: int = OBJECTIVE_BLOCK
) -> tuple[Tensor, Coefficients | None]:
    """Return [C] weighted losses and their derivatives; autograd gives those of a caller's loss."""
    if not isinstance(loss, Objective):
        return autograd_coefficients(loss, rows, weights)
    rows = loss.centred(rows)
    C, lp = len(weights), rows.logprobs
    out = torch.empty(4, C, device=lp.device, dtype=torch.float32)
    high, low, dual = loss.log_ratio_bounds
    cap = math.log(loss.kd_ratio_cap)
    kd_weight = torch.ones_like(lp) if rows.kd_weight is None else rows.kd_weight
    divergence = loss.divergence(rows)
    optional = (rows.old_logprobs, rows.advantages, rows.teacher_logprobs, divergence, rows.entropy)
    # lp replaces what is None: old = lp gives a ratio of 1, the others are never read
    old, advantages, lq, kl, entropy = (lp if x is None else x for x in optional)
    kd = "rkl" if loss.topk_kd else loss.kd  # the loss reads kl alone, whatever divergence it is
    if C:
        _objective_kernel[(triton.cdiv(C, BLOCK),)](
            lp, old, advantages, kd_weight, lq, kl, entropy, weights, out, C, high, low, dual, cap,
            float(loss.k3_bound), float(loss.kd_coef), float(loss.entropy_coef),
            loss.policy != "off", KD_CODES[kd], loss.entropy, BLOCK, **OPTIONS,
        )  # fmt: skip
    kl, forward_kl = loss.shares(None if divergence is None else out[3])
    return out[0], Coefficients(out[1], out[2] if loss.entropy else None, kl, forward_kl)
