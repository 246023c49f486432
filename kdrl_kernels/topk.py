"""Divergences between student and teacher over K tokens of a row and, in one bucket, all others.

p_k and q_k are the probabilities of the K tokens, r and q_r those of all others together (the
tail). Values and derivatives are closed formulas on [C, K]. Derivations: rows/README.md.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdrl_kernels.objective import TopkKd
from kdrl_kernels.token_rows import Coefficients

ROUNDINGS = 16
"""Units of rounding of 1, up to which a teacher's rest of probability is not told from another."""


@dataclass(frozen=True, slots=True)
class TopkDivergence:
    """Holds a divergence of each row and its derivatives.

    With a tail, p and r sum to 1, so the derivatives in log p_k and log r are right up to any
    multiple of p_k and r. The multiple here makes all of them exactly 0 where p = q.
    """

    value: Tensor
    """[C] in nats."""
    extra: Tensor
    """[C, K], derivatives in log p_k; 0 where a row has no such token."""
    rest: Tensor | None
    """[C], derivatives in log r; None without a tail."""

    def in_ids(self, coef: Coefficients) -> Coefficients:
        """Turn the derivative in this divergence into those in log p_k and log r.

        They are 0 where it is, even if the divergence is infinite.
        """
        g = coef.kl
        assert g is not None
        extra = torch.where(g[:, None] == 0, 0, g[:, None] * self.extra)
        rest = None if self.rest is None else torch.where(g == 0, 0, g * self.rest)
        return replace(coef, kl=None, extra=extra, rest=rest)


def teacher_rest(logq: Tensor, logr: Tensor) -> Tensor:
    """Return log q_r, [C]: the teacher's probability on none of the K tokens, 1 - sum_k q_k.

    The sum of K rounded numbers is right to a few units of rounding, no more. So a rest that is as
    close as that to the student's counts as equal to it, and no other one is smaller than that:
    a sum that rounds to 1 does not make a divergence infinite.

    Args:
        logq: [C, K] in nats, -inf where a row has no such token.
        logr: [C] in nats, the student's rest; a constant here.
    """
    least = ROUNDINGS * torch.finfo(logq.dtype).eps
    q_r = -torch.expm1(torch.logsumexp(logq, dim=1))
    logr = logr.detach()
    return torch.where((q_r - logr.exp()).abs() <= least, logr, q_r.clamp(min=least).log())


def with_tail(logp: Tensor, logq: Tensor, logr: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p and log q of K + 1 buckets, [C, K + 1], the last of which is the tail."""
    tails = logr, teacher_rest(logq, logr)
    logp, logq = (
        torch.cat([x, tail[:, None]], dim=1) for x, tail in zip((logp, logq), tails, strict=True)
    )
    return logp, logq


def topk_divergence(
    kd: TopkKd, logp: Tensor, logq: Tensor, logr: Tensor | None, alpha: float
) -> TopkDivergence:
    """Compute a divergence over K tokens and its derivatives.

    "topk_rkl": sum_k p_k (log p_k - log q_k); "topk_fkl": sum_k q_k (log q_k - log p_k);
    "topk_jsd": alpha · (sum_k q_k (log q_k - log m_k)) + (1 - alpha) · (sum_k p_k (log p_k -
    log m_k)), m = alpha q + (1 - alpha) p; each over the tail too, where logr is passed.

    Args:
        logp, logq: [C, K] in nats, of student and teacher; both -inf where a row has no such token.
        logr: [C] in nats, the student's probability on none of them; None: no tail.
        alpha: the teacher's share of m.
    """
    if logr is not None:
        logp, logq = with_tail(logp, logq, logr)
    p, q = logp.exp(), logq.exp()
    log_ratio = torch.where(logp == logq, 0, logp - logq)  # 0 too where both are -inf
    if kd == "topk_rkl":
        derivative = _product(p, log_ratio)
        value = derivative.sum(dim=1)
        if logr is None:
            derivative = derivative + p
    elif kd == "topk_fkl":
        value = -_product(q, log_ratio).sum(dim=1)
        derivative = -q if logr is None else p - q
    else:
        share = alpha + (1 - 2 * alpha) * (log_ratio < 0).to(p.dtype)  # of the smaller of p and q
        t = -torch.log1p(share * torch.expm1(-log_ratio.abs()))
        derivative = (1 - alpha) * _product(p, t + log_ratio.clamp(max=0))
        value = (derivative + alpha * _product(q, t - log_ratio.clamp(min=0))).sum(dim=1)
    if logr is None:
        return TopkDivergence(value, derivative, None)
    return TopkDivergence(value, derivative[:, :-1], derivative[:, -1])


def _product(weights: Tensor, values: Tensor) -> Tensor:
    """Multiply, where 0 · inf is 0."""
    return torch.where(weights == 0, 0, weights * values)
