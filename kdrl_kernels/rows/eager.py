"""Row work in plain PyTorch, in place and in blocks of rows that stay in a CPU's cache.

The sweep leaves exp(d), d = z - max z, where the student's logits were (with a softcap d: its slope
is not 0 where exp(d) is), and in the teacher's place what the gradient needs of both: it is then a
sum of two or three buffers times a number each row.
Maths: README.md.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kdrl_kernels.objective import (
    Coefficients,
    Objective,
    Rows,
    TokenLoss,
    kd_pull,
    sampled_kd,
)
from kdrl_kernels.objective import coefficients as autograd_coefficients
from kdrl_kernels.rows import Stats, Stream, TeacherStream

CPU_BLOCK_ELEMENTS = 1 << 18
"""Logits of one block of rows on a CPU: 1 MB of float32."""
GPU_BLOCK_ELEMENTS = 1 << 23
"""The same on a GPU: enough to fill it."""
BLOCK_BUFFERS = 6
"""Temporaries of a block's size that are alive together, at most."""


def block_rows(V: int, device: torch.device) -> int:
    """Rows of one block, at least 1."""
    elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS
    return max(1, elements // V)


def sweep(
    student: Stream, tokens: Tensor, *, teacher: TeacherStream | None = None, entropy: bool = False
) -> Stats:
    """Statistics of one stream, or of two with their divergence; what is left: see above."""
    blocks = [
        _sweep_block(student, tokens[rows], rows, teacher, entropy)
        for rows in _blocks(len(tokens), student.logits)
    ]
    return Stats(**{name: torch.cat([block[name] for block in blocks]) for name in blocks[0]})


def _sweep_block(
    student: Stream, tokens: Tensor, rows: slice, teacher: TeacherStream | None, entropy: bool
) -> dict[str, Tensor]:
    d, top = _lower_(student, rows)
    d_y = _pick(d, tokens)
    found = {"max": top}
    keep = student.softcap is not None
    if teacher is None:
        e = _exp(d, keep or entropy)
        total = e.sum(dim=1)
    else:
        d_t, top_t = _lower_(teacher, rows)
        d_t_y = _pick(d_t, tokens)
        e, total, total_t, other = _divergence_(d, d_t, teacher, keep or entropy)
        log_sum_t = total_t.log()
        found |= other | {"teacher_max": top_t, "teacher_log_sum": log_sum_t}
        found["teacher_logprobs"] = d_t_y - log_sum_t
    found["log_sum"] = total.log()
    found["logprobs"] = d_y - found["log_sum"]
    if entropy:
        found["entropy"] = found["log_sum"] - _sum_(d * e) / total
        if not keep:
            d.copy_(e)
    return found


def _lower_(stream: Stream, rows: slice, top: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(d in the place of the logits, max a)."""
    d = stream.logits[rows]
    if stream.softcap is not None:
        d.div_(stream.softcap).tanh_().mul_(stream.softcap)
    top = d.amax(dim=1) if top is None else top
    d.sub_(top[:, None])
    if isinstance(stream.temperature, Tensor) or stream.temperature != 1:
        d.div_(_column(stream.temperature, rows))
    return d, top


def _exp(d: Tensor, keep: bool) -> Tensor:
    """exp(d), over d unless it is kept."""
    return d.exp() if keep else d.exp_()


def _divergence_(
    d: Tensor, d_t: Tensor, teacher: TeacherStream, keep: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(exp(d), its sum, that of exp(d_t), the divergences of a block).

    Over d_t: "rkl" exp(d) (d - d_t), "fkl" (q - p) sum exp(d_t), "jsd" exp(d) (log p - log m).
    """
    e_t = d_t.exp()
    total_t = e_t.sum(dim=1)
    if teacher.kd == "fkl":
        gap = (d_t - d).mul_(e_t)
        e = _exp(d, keep)
        total = e.sum(dim=1)
        torch.sub(e_t, torch.mul(e, (total_t / total)[:, None], out=d_t), out=d_t)
        kl = _sum_(gap) / total_t - (total_t.log() - total.log())
        return e, total, total_t, {"kl": kl}
    gap = d_t.sub_(d)
    e = _exp(d, keep)
    total = e.sum(dim=1)
    log_ratio = total_t.log() - total.log()
    if teacher.kd == "rkl":
        kl = _sum_(gap.mul_(e).neg_()) / total + log_ratio
        return e, total, total_t, {"kl": kl}
    alpha = teacher.jsd_alpha
    t = _mixture_gap(gap.sub_(log_ratio[:, None]), alpha)
    q_kl = _sum_((t + gap.clamp(max=0)).mul_(e_t)) / total_t
    p_kl = _sum_(torch.sub(t, gap.clamp_(min=0), out=gap).mul_(e)) / total
    return e, total, total_t, {"kl": alpha * q_kl + (1 - alpha) * p_kl, "mixture_kl": p_kl}


def _sum_(terms: Tensor) -> Tensor:
    """Sum of each row; NaN, which is 0 · inf, becomes 0."""
    return _nan_to_0(terms).sum(dim=1)


def _mixture_gap(gap: Tensor, alpha: float) -> Tensor:
    """t of log p - log m = t - max(gap, 0) and log q - log m = t + min(gap, 0).

    gap = log q - log p, m = alpha q + (1 - alpha) p, t = -log(1 + w (exp(-|gap|) - 1)) with w the
    share of the smaller one: no cancellation.
    """
    # where(gap > 0, 1 - alpha, alpha), whose numbers would be broadcast at the price of an exp
    share = torch.gt(gap, 0, out=torch.empty_like(gap)).mul_(1 - 2 * alpha).add_(alpha)
    return gap.abs().neg_().expm1_().mul_(share).log1p_().neg_()


def resume_(stream: Stream, stats: Stats) -> None:
    """What sweep left of one stream, out of the same logits projected again."""
    for rows in _blocks(len(stream.logits), stream.logits):
        d, _ = _lower_(stream, rows, stats.max[rows])
        if stream.softcap is None:
            d.exp_()


def coefficients(
    loss: TokenLoss, rows: Rows, weights: Tensor
) -> tuple[Tensor, Coefficients | None]:
    """([C] weighted losses, their derivatives); a caller's own loss goes through autograd."""
    if not isinstance(loss, Objective):
        return autograd_coefficients(loss, rows, weights)
    rows = loss.centred(rows)
    lp = rows.logprobs
    log_ratio = torch.zeros_like(lp) if rows.old_logprobs is None else lp - rows.old_logprobs
    value, c, g = torch.zeros_like(lp), torch.zeros_like(lp), None
    if loss.policy != "off":
        value, c = _policy(loss, log_ratio, rows.advantages)
    if loss.kd is not None:
        cap = math.inf if rows.old_logprobs is None else math.log(loss.kd_ratio_cap)
        scale = log_ratio.clamp(max=cap).exp_().mul_(loss.kd_coef)
        if rows.kd_weight is not None:
            scale *= rows.kd_weight
        if rows.kl is not None:
            value += scale * torch.where(scale == 0, 0, rows.kl)
            g = scale * weights
        else:
            assert rows.teacher_logprobs is not None
            teacher_log_ratio = torch.where(scale == 0, 0, lp - rows.teacher_logprobs)
            value += scale * sampled_kd(loss.kd, teacher_log_ratio)
            c += scale * kd_pull(loss.kd, teacher_log_ratio)
    e = None
    if loss.entropy:
        assert rows.entropy is not None
        value -= loss.entropy_coef * rows.entropy
        e = -loss.entropy_coef * weights
    return weights * value, Coefficients(weights * c, e, g)


def _policy(
    objective: Objective, log_ratio: Tensor, advantages: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(-A r within its bounds, its derivative in lp): 0 outside them, and where A = 0."""
    assert advantages is not None
    high, low, dual = (log_ratio.new_full((), x) for x in objective.log_ratio_bounds)
    upper = torch.where(advantages > 0, high, dual)
    lower = torch.where(advantages < 0, low, -math.inf)
    value = -advantages * torch.where(advantages == 0, 0, log_ratio.clamp(lower, upper)).exp_()
    outside = (log_ratio > upper) | (log_ratio < lower) | (advantages == 0)
    return value, torch.where(outside, 0, value)


def gradient(
    student: Stream,
    tokens: Tensor,
    stats: Stats,
    coef: Coefficients,
    *,
    out: Tensor,
    teacher: TeacherStream | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """dL/dlogits of row source[n] in out[n]; source None: of row n. Rows with source -1 are left.

    out [C, V] may be the student's own memory, as it is or as a 16-bit view: source[n] is n, or
    a row that no slot of out lies over. The teacher's memory is used up.
    """
    source = None if source is None else source[source >= 0]
    own, of_teacher, of_entropy = _scales(stats, coef, teacher)
    for slots in _blocks(len(tokens) if source is None else len(source), student.logits):
        rows = slots if source is None else source[slots]
        e, slope = student.logits[rows], None
        if student.softcap is not None:
            e, slope = e.exp(), _softcap_slope(student, e, stats.max, rows)
        surprise = None if of_entropy is None else torch.xlogy(e, e).mul_(of_entropy[rows, None])
        direct = source is None and out.dtype == e.dtype
        dz = torch.mul(e, own[rows, None], out=out[slots] if direct else None)
        if surprise is not None:
            dz += surprise
        if teacher is not None and of_teacher is not None:
            dz += _nan_to_0(teacher.logits[rows].mul_(of_teacher[rows, None]))
        dz.scatter_add_(1, tokens[rows, None], coef.logprobs[rows, None])
        if slope is not None:
            dz *= slope
        if isinstance(student.temperature, Tensor) or student.temperature != 1:
            dz /= _column(student.temperature, rows)
        if not direct:
            out[slots] = dz
    return out


def _scales(
    stats: Stats, coef: Coefficients, teacher: TeacherStream | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[C] factors of exp(d), of what lies in the teacher's place, and of exp(d) d; 0 where g is."""
    total = stats.log_sum.exp()
    own, of_teacher, of_entropy = -coef.logprobs, None, None
    if coef.kl is not None:
        assert teacher is not None
        assert stats.teacher_log_sum is not None
        g, log_sum_t = coef.kl, stats.teacher_log_sum
        if teacher.kd == "fkl":
            of_teacher, pull = -g / log_sum_t.exp(), torch.zeros_like(g)
        elif teacher.kd == "rkl":
            assert stats.kl is not None
            of_teacher, pull = g / total, log_sum_t - stats.log_sum - stats.kl
        else:
            assert stats.mixture_kl is not None
            g = g * (1 - teacher.jsd_alpha)
            of_teacher, pull = g / total, -stats.mixture_kl
        own = own + torch.where(g == 0, 0, g * pull)
    if coef.entropy is not None:
        assert stats.entropy is not None
        own = own - coef.entropy * (stats.entropy - stats.log_sum)
        of_entropy = -coef.entropy / total
    return own / total, of_teacher, of_entropy


def _softcap_slope(stream: Stream, d: Tensor, top: Tensor, rows: slice | Tensor) -> Tensor:
    """d softcap(x) / dx = 1 - tanh², with tanh = (temperature · d + max) / softcap."""
    assert stream.softcap is not None
    a = (d * _column(stream.temperature, rows)).add_(top[rows, None])
    return 1 - a.div_(stream.softcap).square_()


def _nan_to_0(terms: Tensor) -> Tensor:
    """0 · inf counts 0."""
    return terms.nan_to_num_(nan=0, posinf=math.inf, neginf=-math.inf)


def _pick(d: Tensor, tokens: Tensor) -> Tensor:
    return d.gather(1, tokens[:, None]).squeeze(1)


def _column(value: float | Tensor, rows: slice | Tensor) -> float | Tensor:
    return value[rows, None] if isinstance(value, Tensor) else value


def _blocks(rows: int, logits: Tensor) -> Iterator[slice]:
    step = block_rows(logits.shape[1], logits.device)
    for start in range(0, max(rows, 1), step):  # no rows: one empty block
        yield slice(start, min(start + step, rows))
