"""Row work in plain PyTorch, in blocks of rows that stay in a CPU's cache. Maths: README.md."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kdrl_kernels.objective import Objective, Rows, token_losses
from kdrl_kernels.rows import Coefficients, Stats, Stream

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


def activate_(stream: Stream) -> None:
    """Replace logits by z = softcap(logits) / temperature; nothing to do without either."""
    z = stream.logits
    if stream.softcap is not None:
        z.div_(stream.softcap).tanh_().mul_(stream.softcap)
    if isinstance(stream.temperature, Tensor) or stream.temperature != 1:
        z.div_(_column(stream.temperature))


def sweep(
    student: Stream,
    tokens: Tensor,
    *,
    teacher: Stream | None = None,
    kd: str | None = None,
    entropy: bool = False,
) -> Stats:
    """Statistics of one stream, or of two with their exact KL."""
    blocks = [
        _sweep_block(student, tokens, rows, teacher, kd, entropy)
        for rows in _blocks(student.logits)
    ]
    return Stats(**{name: torch.cat([block[name] for block in blocks]) for name in blocks[0]})


def _sweep_block(
    student: Stream,
    tokens: Tensor,
    rows: slice,
    teacher: Stream | None,
    kd: str | None,
    entropy: bool,
) -> dict[str, Tensor]:
    found, d, e, total = _shift(student, rows)
    found["logprobs"] = _pick(d, tokens[rows]) - found["log_sum"]
    if entropy:
        found["entropy"] = found["log_sum"] - _expectation(e, d) / total
    if teacher is None:
        return found
    other, d_t, e_t, total_t = _shift(teacher, rows)
    gap = other["log_sum"] - found["log_sum"]
    if kd == "rkl":
        found["kl"] = _expectation(e, d - d_t) / total + gap
    else:
        found["kl"] = _expectation(e_t, d_t - d) / total_t - gap
    found["teacher_max"], found["teacher_log_sum"] = other["max"], other["log_sum"]
    found["teacher_logprobs"] = _pick(d_t, tokens[rows]) - other["log_sum"]
    return found


def _shift(stream: Stream, rows: slice) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """({max, log_sum}, d = z - max, exp(d), sum of exp(d)) of a block of rows."""
    z = stream.logits[rows]
    top = z.amax(dim=1, keepdim=True)
    d = z - top
    e = d.exp()
    total = e.sum(dim=1)
    return {"max": top.squeeze(1), "log_sum": total.log()}, d, e, total


def coefficients(objective: Objective, rows: Rows, weights: Tensor) -> tuple[Tensor, Coefficients]:
    """([C] weighted losses, their derivatives): token_losses under autograd on [C] vectors."""
    names = ["logprobs"]
    names += ["entropy"] if objective.entropy_coef else []
    names += ["kl"] if rows.kl is not None else []
    leaves = {name: getattr(rows, name).detach().requires_grad_() for name in names}
    with torch.enable_grad():
        losses = weights * token_losses(objective, replace(rows, **leaves))
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
    return losses.detach(), Coefficients(**dict(zip(names, grads, strict=True)))


def gradient_(
    student: Stream,
    tokens: Tensor,
    stats: Stats,
    coef: Coefficients,
    *,
    dtype: torch.dtype,
    teacher: Stream | None = None,
    kd: str | None = None,
) -> Tensor:
    """dL/dlogits [C, V] in dtype, written over the student's z."""
    z = student.logits
    out = z if z.dtype == dtype else z.view(dtype)[:, : z.shape[1]]
    for rows in _blocks(z):
        dz = _gradient_block(student, tokens[rows], stats, coef, rows, teacher, kd)
        if student.softcap is not None:
            tanh = z[rows] * (_column(student.temperature, rows) / student.softcap)
            dz *= 1 - tanh.square_()
        out[rows] = dz.div_(_column(student.temperature, rows))
    return out


def _gradient_block(
    student: Stream,
    tokens: Tensor,
    stats: Stats,
    coef: Coefficients,
    rows: slice,
    teacher: Stream | None,
    kd: str | None,
) -> Tensor:
    """c (1[v = y] - p) + g · dKL/dz + e · dentropy/dz of one block: dL/dz."""
    logp = _log_softmax(student.logits[rows], stats.max[rows], stats.log_sum[rows])
    p = logp.exp()
    c = coef.logprobs[rows, None]
    dz = p * -c
    if coef.kl is not None:
        assert teacher is not None
        assert stats.teacher_max is not None
        assert stats.teacher_log_sum is not None
        assert stats.kl is not None
        g = coef.kl[rows, None]
        logq = _log_softmax(
            teacher.logits[rows], stats.teacher_max[rows], stats.teacher_log_sum[rows]
        )
        if kd == "rkl":
            pull = (logp - logq).sub_(stats.kl[rows, None])
            dz += torch.where((p > 0) & (g != 0), pull, 0).mul_(p).mul_(g)
        else:
            dz += (p - logq.exp_()).mul_(g)
    if coef.entropy is not None:
        assert stats.entropy is not None
        surprise = torch.where(p > 0, logp, 0).add_(stats.entropy[rows, None])
        dz -= surprise.mul_(p).mul_(coef.entropy[rows, None])
    return dz.scatter_add_(1, tokens[:, None], c)


def _log_softmax(z: Tensor, top: Tensor, log_sum: Tensor) -> Tensor:
    return (z - top[:, None]).sub_(log_sum[:, None])


def _expectation(e: Tensor, values: Tensor) -> Tensor:
    """sum_v e_v · values_v of each row, where 0 · inf counts 0."""
    return torch.where(e > 0, values, 0).mul_(e).sum(dim=1)


def _pick(d: Tensor, tokens: Tensor) -> Tensor:
    return d.gather(1, tokens[:, None]).squeeze(1)


def _column(value: float | Tensor, rows: slice = slice(None)) -> float | Tensor:
    return value[rows, None] if isinstance(value, Tensor) else value


def _blocks(logits: Tensor) -> Iterator[slice]:
    step = block_rows(logits.shape[1], logits.device)
    for start in range(0, max(len(logits), 1), step):  # no rows: one empty block
        yield slice(start, start + step)
