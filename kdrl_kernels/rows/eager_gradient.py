"""Turns what the sweep of `eager` left of the logits into their gradient, in place, in PyTorch.

The gradient of a row is a sum of two or three buffers, each times a number. Maths: README.md.
"""

import torch
from torch import Tensor

from kdrl_kernels.rows.blocks import column, nan_to_0, row_blocks
from kdrl_kernels.rows.ids import filled, normalizer_factor, rest_factor
from kdrl_kernels.rows.streams import Stats, Stream, TeacherStream
from kdrl_kernels.token_rows import Coefficients


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
    ids = None if stats.at_ids is None else filled(stats.at_ids.columns, tokens)
    id_scale, scale = scale, _rest_scale(scale, stats, coef)
    for slots in row_blocks(len(tokens) if source is None else len(source), student.logits):
        rows = slots if source is None else source[slots]
        d = student.logits[rows]
        e = d.exp() if keeps_d(student, stats) else d
        slope = None if student.softcap is None else _softcap_slope(student, d, stats.max, rows)
        surprise, part = None, None
        if entropy_scale is not None:
            surprise = torch.xlogy(e, e).mul_(entropy_scale[rows, None])
        if teacher is not None and teacher_scale is not None:
            part = _teacher_part_(teacher.logits[rows], d, e, teacher_scale, forward_scale, rows)
        if ids is not None and coef.rest is not None:
            at_ids = e.gather(1, ids[rows]).mul_(id_scale[rows, None])
        direct = source is None and out.dtype == e.dtype
        dz = torch.mul(e, scale[rows, None], out=out[slots] if direct else None)
        if ids is not None and coef.rest is not None:  # written: p / r - p / r would cancel
            dz.scatter_(1, ids[rows], at_ids)
        if surprise is not None:
            dz += surprise
        if part is not None:
            dz += part
        dz.scatter_add_(1, tokens[rows, None], coef.logprobs[rows, None])
        if ids is not None and coef.extra is not None:
            dz.scatter_add_(1, ids[rows], coef.extra[rows])
        _of_logits_(dz, slope, student.temperature, rows)
        if not direct:
            out[slots] = dz
    return out


def _of_logits_(
    dz: Tensor, slope: Tensor | None, temperature: float | Tensor, rows: slice | Tensor
) -> None:
    """Turn dL/dz of a block into dL/dlogits; slope is that of a softcap."""
    if slope is not None:
        dz *= slope
    if isinstance(temperature, Tensor) or temperature != 1:
        dz /= column(temperature, rows)


def entries(
    student: Stream,
    stats: Stats,
    coef: Coefficients,
    teacher: TeacherStream | None,
    row: Tensor,
    column: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return dL/dz of single columns [E] that are no token or id, and log p.

    The streams are as the sweep left them.
    """
    e = flat(student)[row * student.logits.stride(0) + column][:, None]
    d, e = (e, e.exp()) if keeps_d(student, stats) else (e.log(), e)
    scale, teacher_scale, entropy_scale = _scales(stats, coef, teacher)
    scale = _rest_scale(scale, stats, coef)
    dz = e * scale[row, None]
    if entropy_scale is not None:
        dz += torch.xlogy(e, e).mul_(entropy_scale[row, None])
    if teacher is not None and teacher_scale is not None:
        left = flat(teacher)[row * teacher.logits.stride(0) + column][:, None]
        dz += _teacher_part_(left, d, e, teacher_scale, _forward_scale(stats, coef), row)
    return dz[:, 0], d[:, 0] - stats.log_sum[row]


def keeps_d(student: Stream, stats: Stats) -> bool:
    """Say whether the sweep left d, and not exp(d), in the place of the student's logits."""
    return student.softcap is not None or stats.forward_kl is not None


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
    scale, teacher_scale, entropy_scale = -normalizer_factor(coef), None, None
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


def _rest_scale(scale: Tensor, stats: Stats, coef: Coefficients) -> Tensor:
    """Return the [C] factors of exp(d) in columns that are no ids, of those in the ids."""
    if coef.rest is None:
        return scale
    return scale + rest_factor(coef, stats.at_ids) / stats.log_sum.exp()


def _teacher_part_(
    left: Tensor,
    d: Tensor,
    e: Tensor,
    scale: Tensor,
    forward_scale: Tensor | None,
    rows: slice | Tensor,
) -> Tensor:
    """Return what the teacher adds to dz of a block, over what the sweep left in its logits."""
    if forward_scale is None:
        return nan_to_0(left.mul_(scale[rows, None]))
    q_part = left.exp().mul_(forward_scale[rows, None])
    pull = torch.sub(d, left, out=left).mul_(e)  # exactly 0 for equal models
    return nan_to_0(pull.mul_(scale[rows, None])).sub_(q_part)


def _forward_scale(stats: Stats, coef: Coefficients) -> Tensor | None:
    """Return the [C] factor of -exp(d_t) where KL(q‖p) is the second divergence, else None."""
    if coef.forward_kl is None:
        return None
    assert stats.teacher_log_sum is not None
    return coef.forward_kl / stats.teacher_log_sum.exp()


def _softcap_slope(stream: Stream, d: Tensor, top: Tensor, rows: slice | Tensor) -> Tensor:
    """Return d softcap(x) / dx = 1 - tanh², where tanh = (temperature · d + max) / softcap."""
    assert stream.softcap is not None
    a = (d * column(stream.temperature, rows)).add_(top[rows, None])
    return 1 - a.div_(stream.softcap).square_()
