"""Does the row work in plain PyTorch, in place, in blocks of rows that stay in a CPU's cache.

The sweep leaves exp(d), d = z - max z, where the student's logits were; d for a pair of divergences
and for a softcap, whose slope is not 0 where exp(d) is. In the place of the teacher's logits it
leaves what the gradient needs of both. The gradient of a row is then a sum of two or three buffers,
each times a number. Maths: README.md.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels.caller_loss import TokenLoss
from kdrl_kernels.caller_loss import coefficients as autograd_coefficients
from kdrl_kernels.objective import Objective, kd_pull, policy_log_ratio, sampled_kd, subtract
from kdrl_kernels.rows.blocks import BLOCK_BUFFERS, block_rows, column, nan_to_0, row_blocks
from kdrl_kernels.rows.eager_compaction import slots
from kdrl_kernels.rows.eager_gradient import gradient
from kdrl_kernels.rows.entries import BLOCK
from kdrl_kernels.rows.ids import IdStats, filled, log_mass
from kdrl_kernels.rows.streams import Stats, Stream, TeacherStream
from kdrl_kernels.token_rows import Coefficients, Rows

__all__ = [
    "BLOCK",
    "BLOCK_BUFFERS",
    "block_rows",
    "coefficients",
    "gradient",
    "mixture_kl",
    "resume_",
    "slots",
    "sweep",
]


def sweep(
    student: Stream,
    tokens: Tensor,
    *,
    teacher: TeacherStream | None = None,
    entropy: bool = False,
    ids: Tensor | None = None,
    rest: bool = False,
) -> Stats:
    """Compute statistics of one stream, or of two and their divergence; overwrite the logits.

    ids: [C, K] columns whose log-probabilities are computed too; rest: and that of all others.
    """
    columns = tokens[:, None]
    if ids is not None:
        columns = torch.cat([columns, filled(ids, tokens)], dim=1)
    blocks = [
        _sweep_block(student, columns[rows], rows, teacher, entropy, rest)
        for rows in row_blocks(len(tokens), student.logits)
    ]
    parts: dict[str, Any] = {
        name: torch.cat([block[name] for block in blocks]) for name in blocks[0]
    }
    lp, lq, others = parts["logprobs"], parts.get("teacher_logprobs"), parts.pop("rest", None)
    for name in {"logprobs", "teacher_logprobs"} & parts.keys():
        parts[name] = parts[name][:, 0].contiguous()
    stats = Stats(**parts)
    if ids is None:
        return stats
    none = ids < 0
    lp, lq = lp[:, 1:].masked_fill(none, 0), None if lq is None else lq[:, 1:].masked_fill(none, 0)
    others = None if others is None else others.masked_fill(none.all(dim=1), 0)
    return replace(stats, at_ids=IdStats(ids, lp, lq, others))


def _sweep_block(
    student: Stream,
    columns: Tensor,
    rows: slice,
    teacher: TeacherStream | None,
    entropy: bool,
    rest: bool,
) -> dict[str, Tensor]:
    """Return statistics of a block by name; columns [rows, 1 + K]: the token's, then the ids."""
    d, top = _lower_(student, rows)
    d_at = d.gather(1, columns)
    stats = {"max": top}
    keep = student.softcap is not None or (teacher is not None and teacher.kd == "rkl+fkl")
    if teacher is None:
        e = _exp(d, keep or entropy)
        total = e.sum(dim=1)
    else:
        d_t, top_t = _lower_(teacher, rows)
        d_t_at = d_t.gather(1, columns)
        e_t = d_t.exp()
        surprise_t = _sum_(d_t * e_t) if teacher.entropy else None
        _sum_blocks(e_t, teacher.masses, rows)
        e, total, total_t, divergences = _divergence_(d, d_t, e_t, teacher, keep or entropy)
        log_sum_t = total_t.log()
        stats |= divergences | {"teacher_max": top_t, "teacher_log_sum": log_sum_t}
        stats["teacher_logprobs"] = d_t_at - log_sum_t[:, None]
        if surprise_t is not None:
            stats["teacher_entropy"] = log_sum_t - surprise_t / total_t
    _sum_blocks(e, student.masses, rows)
    stats["log_sum"] = total.log()
    stats["logprobs"] = d_at - stats["log_sum"][:, None]
    if rest:
        stats["rest"] = log_mass(_sum_without(e, columns[:, 1:]).log() - stats["log_sum"])
    if entropy:
        stats["entropy"] = stats["log_sum"] - _sum_(d * e) / total
        if not keep:
            d.copy_(e)
    return stats


def _lower_(stream: Stream, rows: slice, top: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return d, in the place of the logits, and max a."""
    d = stream.logits[rows]
    if stream.softcap is not None:
        d.div_(stream.softcap).tanh_().mul_(stream.softcap)
    if top is None:  # at least the lowest finite number: -inf minus -inf would be NaN
        top = d.amax(dim=1).clamp_min_(torch.finfo(d.dtype).min)
    d.sub_(top[:, None])
    if isinstance(stream.temperature, Tensor) or stream.temperature != 1:
        d.div_(column(stream.temperature, rows))
    return d, top


def _exp(d: Tensor, keep: bool) -> Tensor:
    """Return exp(d), written over d unless d is kept."""
    return d.exp() if keep else d.exp_()


def _divergence_(
    d: Tensor, d_t: Tensor, e_t: Tensor, teacher: TeacherStream, keep: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return exp(d), its sum, that of e_t = exp(d_t), and the divergences of a block.

    It overwrites e_t. Over d_t it writes exp(d) (d - d_t) for "rkl", (q - p) sum exp(d_t) for
    "fkl", and exp(d) (log p - log m) for "jsd"; "rkl+fkl" keeps d and d_t, since its gradient
    needs two of these.
    """
    total_t = e_t.sum(dim=1)
    if teacher.kd == "rkl+fkl":
        difference = d - d_t
        e = _exp(d, keep)
        total = e.sum(dim=1)
        log_total_ratio = total_t.log() - total.log()
        forward_kl = -_sum_(e_t.mul_(difference)) / total_t - log_total_ratio
        kl = _sum_(difference.mul_(e)) / total + log_total_ratio
        return e, total, total_t, {"kl": kl, "forward_kl": forward_kl}
    if teacher.kd == "fkl":
        weighted = (d_t - d).mul_(e_t)
        e = _exp(d, keep)
        total = e.sum(dim=1)
        torch.sub(e_t, torch.mul(e, (total_t / total)[:, None], out=d_t), out=d_t)
        kl = _sum_(weighted) / total_t - (total_t.log() - total.log())
        return e, total, total_t, {"kl": kl}
    difference = torch.sub(d, d_t, out=d_t)
    e = _exp(d, keep)
    total = e.sum(dim=1)
    log_total_ratio = total_t.log() - total.log()
    if teacher.kd == "rkl":
        kl = _sum_(difference.mul_(e)) / total + log_total_ratio
        return e, total, total_t, {"kl": kl}
    log_ratio = difference.add_(log_total_ratio[:, None])  # log p - log q
    kl, p_kl = _mixture_(log_ratio, (e, total), (e_t, total_t), teacher.jsd_alpha)
    return e, total, total_t, {"kl": kl, "mixture_kl": p_kl}


def _sum_blocks(e: Tensor, masses: Tensor | None, rows: slice) -> None:
    """Write the sum of each block of BLOCK columns to some rows of masses, if there are any."""
    if masses is None:
        return
    V = e.shape[1]
    full = V // BLOCK
    torch.sum(e[:, : full * BLOCK].unflatten(1, (full, BLOCK)), dim=2, out=masses[rows, :full])
    if V % BLOCK:
        masses[rows, full] = e[:, full * BLOCK :].sum(dim=1)


def _sum_without(e: Tensor, columns: Tensor) -> Tensor:
    """Sum each row without some columns. 1 minus their share would cancel where that is near 1."""
    values = e.gather(1, columns)
    total = e.scatter_(1, columns, 0).sum(dim=1)
    e.scatter_(1, columns, values)
    return total


def _sum_(values: Tensor) -> Tensor:
    """Sum each row; NaN, which is 0 · inf, becomes 0."""
    return nan_to_0(values).sum(dim=1)


def _mixture_(
    log_ratio: Tensor, p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor], alpha: float
) -> tuple[Tensor, Tensor]:
    """Return alpha KL(q‖m) + (1 - alpha) KL(p‖m) and KL(p‖m) over the columns of a block.

    p and q are exponentials and their sums. It writes exp(d) (log p - log m) over log p - log q,
    and overwrites the exponentials of q.
    """
    (e, total), (e_t, total_t) = p, q
    t = _mixture_log_ratio(log_ratio, alpha)
    q_kl = _sum_((t - log_ratio.clamp(min=0)).mul_(e_t)) / total_t
    p_kl = _sum_(torch.add(t, log_ratio.clamp_(max=0), out=log_ratio).mul_(e)) / total
    return alpha * q_kl + (1 - alpha) * p_kl, p_kl


def mixture_kl(student: Stream, teacher: TeacherStream, stats: Stats) -> tuple[Tensor, Tensor]:
    """Return what these columns add to "jsd" and to KL(p‖m), [C] each, of sums in stats.

    Each stream is as a sweep of it alone left it. The teacher's becomes what a sweep of both
    leaves for "jsd".
    """
    assert stats.teacher_log_sum is not None
    total, total_t = stats.log_sum.exp(), stats.teacher_log_sum.exp()
    log_total_ratio = stats.teacher_log_sum - stats.log_sum
    parts = []
    for rows in row_blocks(len(student.logits), student.logits):
        d, e = _swept(student, rows)
        d_t, e_t = _swept(teacher, rows)
        log_ratio = torch.sub(d, d_t).add_(log_total_ratio[rows, None])
        p, q = (e, total[rows]), (e_t, total_t[rows])
        parts.append(torch.stack(_mixture_(log_ratio, p, q, teacher.jsd_alpha)))
        teacher.logits[rows] = log_ratio
    kl, p_kl = torch.cat(parts, dim=1)
    return kl, p_kl


def _swept(stream: Stream, rows: slice) -> tuple[Tensor, Tensor]:
    """Return d and exp(d) of a block that a sweep of one stream left as one of the two."""
    left = stream.logits[rows]
    return (left.log(), left) if stream.softcap is None else (left, left.exp())


def _mixture_log_ratio(log_ratio: Tensor, alpha: float) -> Tensor:
    """Return t, where log p - log m = t + min(l, 0), log q - log m = t - max(l, 0).

    l = log p - log q, m = alpha q + (1 - alpha) p, t = -log(1 + w (exp(-|l|) - 1)), and w is the
    share of the smaller of p and q: nothing cancels.
    """
    # where(l < 0, 1 - alpha, alpha), which would broadcast its two numbers at the price of an exp
    share = torch.lt(log_ratio, 0, out=torch.empty_like(log_ratio))
    share.mul_(1 - 2 * alpha).add_(alpha)
    return log_ratio.abs().neg_().expm1_().mul_(share).log1p_().neg_()


def resume_(stream: Stream, stats: Stats) -> None:
    """Overwrite logits that were projected again with what sweep of one stream left of them."""
    for rows in row_blocks(len(stream.logits), stream.logits):
        d, _ = _lower_(stream, rows, stats.max[rows])
        if stream.softcap is None:
            d.exp_()


def coefficients(
    loss: TokenLoss, rows: Rows, weights: Tensor
) -> tuple[Tensor, Coefficients | None]:
    """Return [C] weighted losses and their derivatives; autograd gives those of a caller's loss."""
    if not isinstance(loss, Objective):
        return autograd_coefficients(loss, rows, weights)
    rows = loss.centred(rows)
    lp = rows.logprobs
    log_ratio = policy_log_ratio(rows)
    value, c, g = torch.zeros_like(lp), torch.zeros_like(lp), None
    if loss.policy != "off":
        value, c = _policy(loss, log_ratio, rows.advantages)
    if loss.kd is not None:
        scale = log_ratio.clamp(max=math.log(loss.kd_ratio_cap)).exp_().mul_(loss.kd_coef)
        if rows.kd_weight is not None:
            scale *= rows.kd_weight
        divergence = loss.divergence(rows)
        if divergence is not None:
            value += scale * torch.where(scale == 0, 0, divergence)
            g = scale * weights
        else:
            assert rows.teacher_logprobs is not None
            teacher_log_ratio = torch.where(scale == 0, 0, subtract(lp, rows.teacher_logprobs))
            value += scale * sampled_kd(loss, teacher_log_ratio)
            c += scale * kd_pull(loss, teacher_log_ratio)
    e = None
    if loss.entropy:
        assert rows.entropy is not None
        value -= loss.entropy_coef * rows.entropy
        e = -loss.entropy_coef * weights
    return weights * value, Coefficients(weights * c, e, *loss.shares(g))


def _policy(
    objective: Objective, log_ratio: Tensor, advantages: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return -A r within its bounds and its derivative in lp, 0 outside them and where A = 0."""
    assert advantages is not None
    high, low, dual = (log_ratio.new_full((), x) for x in objective.log_ratio_bounds)
    upper = torch.where(advantages > 0, high, dual)
    lower = torch.where(advantages < 0, low, -math.inf)
    value = -advantages * torch.where(advantages == 0, 0, log_ratio.clamp(lower, upper)).exp_()
    outside = (log_ratio > upper) | (log_ratio < lower) | (advantages == 0)
    return value, torch.where(outside, 0, value)
