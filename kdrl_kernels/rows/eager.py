"""Does the row work in plain PyTorch, in place, in blocks of rows that stay in a CPU's cache.

The sweep leaves exp(d), d = z - max z, where the student's logits were (with a softcap it leaves d,
since the slope of the softcap is not 0 where exp(d) is). In the place of the teacher's logits it
leaves what the gradient needs of both. The gradient of a row is then a sum of two or three buffers,
each times a number. Maths: README.md.
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
    policy_log_ratio,
    sampled_kd,
    subtract,
)
from kdrl_kernels.objective import coefficients as autograd_coefficients
from kdrl_kernels.rows.entries import BLOCK
from kdrl_kernels.rows.streams import Stats, Stream, TeacherStream

CPU_BLOCK_ELEMENTS = 1 << 18
"""Logits of one block of rows on a CPU: 1 MB of float32."""
GPU_BLOCK_ELEMENTS = 1 << 23
"""Logits of one block of rows on a GPU: enough to fill it."""
BLOCK_BUFFERS = 6
"""The most temporaries of a block's size that are alive together."""


def block_rows(V: int, device: torch.device) -> int:
    """Return the rows of one block, at least 1."""
    elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS
    return max(1, elements // V)


def sweep(
    student: Stream, tokens: Tensor, *, teacher: TeacherStream | None = None, entropy: bool = False
) -> Stats:
    """Compute statistics of one stream, or of two and their divergence; overwrite the logits."""
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
    stats = {"max": top}
    keep = student.softcap is not None
    if teacher is None:
        e = _exp(d, keep or entropy)
        total = e.sum(dim=1)
    else:
        d_t, top_t = _lower_(teacher, rows)
        d_t_y = _pick(d_t, tokens)
        e_t = d_t.exp()
        _sum_blocks(e_t, teacher.masses, rows)
        e, total, total_t, divergences = _divergence_(d, d_t, e_t, teacher, keep or entropy)
        log_sum_t = total_t.log()
        stats |= divergences | {"teacher_max": top_t, "teacher_log_sum": log_sum_t}
        stats["teacher_logprobs"] = d_t_y - log_sum_t
    _sum_blocks(e, student.masses, rows)
    stats["log_sum"] = total.log()
    stats["logprobs"] = d_y - stats["log_sum"]
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
    top = d.amax(dim=1) if top is None else top
    d.sub_(top[:, None])
    if isinstance(stream.temperature, Tensor) or stream.temperature != 1:
        d.div_(_column(stream.temperature, rows))
    return d, top


def _exp(d: Tensor, keep: bool) -> Tensor:
    """Return exp(d), written over d unless d is kept."""
    return d.exp() if keep else d.exp_()


def _divergence_(
    d: Tensor, d_t: Tensor, e_t: Tensor, teacher: TeacherStream, keep: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return exp(d), its sum, that of e_t = exp(d_t), and the divergences of a block.

    It overwrites e_t. Over d_t it writes exp(d) (d - d_t) for "rkl", (q - p) sum exp(d_t) for
    "fkl", and exp(d) (log p - log m) for "jsd"; "rkl+fkl" keeps d_t, since its gradient needs two
    of these.
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
    alpha = teacher.jsd_alpha
    log_ratio = difference.add_(log_total_ratio[:, None])  # log p - log q
    t = _mixture_log_ratio(log_ratio, alpha)
    q_kl = _sum_((t - log_ratio.clamp(min=0)).mul_(e_t)) / total_t
    p_kl = _sum_(torch.add(t, log_ratio.clamp_(max=0), out=log_ratio).mul_(e)) / total
    return e, total, total_t, {"kl": alpha * q_kl + (1 - alpha) * p_kl, "mixture_kl": p_kl}


def _sum_blocks(e: Tensor, masses: Tensor | None, rows: slice) -> None:
    """Write the sum of each block of BLOCK columns to some rows of masses, if there are any."""
    if masses is None:
        return
    V = e.shape[1]
    full = V // BLOCK
    torch.sum(e[:, : full * BLOCK].unflatten(1, (full, BLOCK)), dim=2, out=masses[rows, :full])
    if V % BLOCK:
        masses[rows, full] = e[:, full * BLOCK :].sum(dim=1)


def _sum_(values: Tensor) -> Tensor:
    """Sum each row; NaN, which is 0 · inf, becomes 0."""
    return _nan_to_0(values).sum(dim=1)


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
    for rows in _blocks(len(stream.logits), stream.logits):
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
        if rows.kl is not None:
            value += scale * torch.where(scale == 0, 0, rows.kl)
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
    return weights * value, Coefficients(weights * c, e, g)


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
    """Write dL/dlogits of row source[n] to out[n]; of row n where source is None.

    Slots with source -1 are not written. out [C, V] may be the student's memory, as it is or as a
    16-bit view: source[n] is n, or a row whose memory no slot of out covers. The teacher's logits
    are overwritten.
    """
    source = None if source is None else source[source >= 0]
    scale, teacher_scale, entropy_scale = _scales(stats, coef, teacher)
    forward_scale = _forward_scale(stats, coef)
    for slots in _blocks(len(tokens) if source is None else len(source), student.logits):
        rows = slots if source is None else source[slots]
        e, slope = student.logits[rows], None
        if student.softcap is not None:
            e, slope = e.exp(), _softcap_slope(student, e, stats.max, rows)
        surprise, part = None, None
        if entropy_scale is not None:
            surprise = torch.xlogy(e, e).mul_(entropy_scale[rows, None])
        if teacher is not None and teacher_scale is not None:
            part = _teacher_part_(teacher.logits[rows], e, teacher_scale, forward_scale, rows)
        direct = source is None and out.dtype == e.dtype
        dz = torch.mul(e, scale[rows, None], out=out[slots] if direct else None)
        if surprise is not None:
            dz += surprise
        if part is not None:
            dz += part
        dz.scatter_add_(1, tokens[rows, None], coef.logprobs[rows, None])
        if slope is not None:
            dz *= slope
        if isinstance(student.temperature, Tensor) or student.temperature != 1:
            dz /= _column(student.temperature, rows)
        if not direct:
            out[slots] = dz
    return out


def entries(
    student: Stream,
    stats: Stats,
    coef: Coefficients,
    teacher: TeacherStream | None,
    row: Tensor,
    column: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return dL/dz of single columns [E], without the term of the sampled token, and log p.

    The streams are as the sweep left them.
    """
    e = flat(student)[row * student.logits.stride(0) + column][:, None]
    d, e = (e, e.exp()) if student.softcap is not None else (e.log(), e)
    scale, teacher_scale, entropy_scale = _scales(stats, coef, teacher)
    dz = e * scale[row, None]
    if entropy_scale is not None:
        dz += torch.xlogy(e, e).mul_(entropy_scale[row, None])
    if teacher is not None and teacher_scale is not None:
        left = flat(teacher)[row * teacher.logits.stride(0) + column][:, None]
        dz += _teacher_part_(left, e, teacher_scale, _forward_scale(stats, coef), row)
    return dz[:, 0], d[:, 0] - stats.log_sum[row]


def flat(stream: Stream) -> Tensor:
    """View the memory of a stream's logits, padding included, as one row."""
    logits = stream.logits
    return logits.as_strided((len(logits) * logits.stride(0),), (1,))


def _scales(
    stats: Stats, coef: Coefficients, teacher: TeacherStream | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the [C] factors of exp(d), of what replaced the teacher's logits, and of exp(d) d.

    The factors from the divergence are 0 where g is, even if the divergence is infinite.
    """
    total = stats.log_sum.exp()
    scale, teacher_scale, entropy_scale = -coef.logprobs, None, None
    if coef.lse is not None:
        scale = scale + coef.lse
    if coef.kl is not None:
        assert teacher is not None
        assert stats.teacher_log_sum is not None
        g, log_sum_t = coef.kl, stats.teacher_log_sum
        if teacher.kd == "fkl":
            teacher_scale, pull = -g / log_sum_t.exp(), torch.zeros_like(g)
        elif teacher.kd in ("rkl", "rkl+fkl"):
            assert stats.kl is not None
            teacher_scale, pull = g / total, log_sum_t - stats.log_sum - stats.kl
        else:
            assert stats.mixture_kl is not None
            g = g * (1 - teacher.jsd_alpha)
            teacher_scale, pull = g / total, -stats.mixture_kl
        scale = scale + torch.where(g == 0, 0, g * pull)
    if coef.forward_kl is not None:
        scale = scale + coef.forward_kl
    if coef.entropy is not None:
        assert stats.entropy is not None
        scale = scale - coef.entropy * (stats.entropy - stats.log_sum)
        entropy_scale = -coef.entropy / total
    return scale / total, teacher_scale, entropy_scale


def _teacher_part_(
    left: Tensor, e: Tensor, scale: Tensor, forward_scale: Tensor | None, rows: slice | Tensor
) -> Tensor:
    """Return what the teacher adds to dz of a block, over what the sweep left in its logits."""
    if forward_scale is None:
        return _nan_to_0(left.mul_(scale[rows, None]))
    q_part = left.exp().mul_(forward_scale[rows, None])
    pull = torch.xlogy(e, e).sub_(left.mul_(e))  # exp(d) (d - d_t)
    return _nan_to_0(pull.mul_(scale[rows, None])).sub_(q_part)


def _forward_scale(stats: Stats, coef: Coefficients) -> Tensor | None:
    """Return the [C] factor of -exp(d_t) where KL(q‖p) is the second divergence, else None."""
    if coef.forward_kl is None:
        return None
    assert stats.teacher_log_sum is not None
    return coef.forward_kl / stats.teacher_log_sum.exp()


def _softcap_slope(stream: Stream, d: Tensor, top: Tensor, rows: slice | Tensor) -> Tensor:
    """Return d softcap(x) / dx = 1 - tanh², where tanh = (temperature · d + max) / softcap."""
    assert stream.softcap is not None
    a = (d * _column(stream.temperature, rows)).add_(top[rows, None])
    return 1 - a.div_(stream.softcap).square_()


def _nan_to_0(values: Tensor) -> Tensor:
    """Replace NaN, which is 0 · inf here, by 0 in place."""
    return values.nan_to_num_(nan=0, posinf=math.inf, neginf=-math.inf)


def _pick(d: Tensor, tokens: Tensor) -> Tensor:
    return d.gather(1, tokens[:, None]).squeeze(1)


def _column(value: float | Tensor, rows: slice | Tensor) -> float | Tensor:
    return value[rows, None] if isinstance(value, Tensor) else value


def _blocks(rows: int, logits: Tensor) -> Iterator[slice]:
    step = block_rows(logits.shape[1], logits.device)
    for start in range(0, max(rows, 1), step):  # no rows: one empty block
        yield slice(start, min(start + step, rows))
