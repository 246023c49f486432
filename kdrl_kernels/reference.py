"""Defines every loss in eager PyTorch, with full [N, V] logits and autograd, on any device.

The tests measure against float64 inputs; float16 and bfloat16 are computed in float32.
"""

from dataclasses import fields, replace

import torch
from torch import Tensor

from kdrl_kernels.adapter import LowRank
from kdrl_kernels.autocast import Project, without_autocast
from kdrl_kernels.call import LogprobCall, LossCall, RowOutputs, RowSet, take
from kdrl_kernels.caller_loss import NO_GRADIENT
from kdrl_kernels.checks import bad_ids, bad_tokens, check_head_values, check_values, poison
from kdrl_kernels.head import Head, StudentHead, gathered
from kdrl_kernels.objective import Objective
from kdrl_kernels.rows.ids import log_mass
from kdrl_kernels.topk import with_tail
from kdrl_kernels.topk_checks import check_topk_values
from kdrl_kernels.truncation import Truncation, truncate_


def with_adapter(head: StudentHead, adapter: LowRank) -> StudentHead:
    """Return the head [weight, B] of hidden states [hidden, scale · hidden · Aᵀ]."""
    hidden, dtype = head.hidden, torch.promote_types(head.hidden.dtype, torch.float32)
    A, B = gathered(adapter.A, hidden), gathered(adapter.B, hidden)
    finite = torch.where(hidden.isfinite(), hidden, 0)  # rows that are left out may hold NaN
    narrow = Project.apply(finite.to(dtype), _rounded(A, hidden.dtype).to(dtype)) * adapter.scale
    wide = torch.cat([hidden, narrow.to(hidden.dtype)], dim=1)
    return replace(head, hidden=wide, weight=torch.cat([head.weight.detach(), B], dim=1))


def head_logits(head: Head, vocab_size: int) -> Tensor:
    """Return z of the head's first columns, [N, vocab_size] in float32 or float64."""
    dtype = torch.promote_types(head.hidden.dtype, torch.float32)
    hidden, weight = head.hidden, _rounded(head.weight[:vocab_size], head.hidden.dtype)
    logits = Project.apply(hidden.to(dtype), weight.to(dtype))
    if head.bias is not None:
        logits = logits + _rounded(head.bias[:vocab_size], hidden.dtype).to(dtype)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    temperature = head.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(dtype)[:, None]
    return logits / temperature


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a wider tensor to dtype and back; its gradient is not rounded."""
    if torch.promote_types(tensor.dtype, dtype) == dtype:
        return tensor
    change = (tensor.to(dtype).to(tensor.dtype) - tensor).detach()
    return tensor + torch.where(tensor.isfinite(), change, 0)


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """Return KL(p‖q) of each row, [N], of log-probabilities [N, V]; a column with p = 0 counts 0.

    An infinite term is a constant, so that a row of KD weight 0 keeps a gradient of 0, not NaN.
    """
    p = logp.exp()
    log_ratio = torch.where(p > 0, logp - logq, 0)
    finite = log_ratio.isfinite()
    infinite_part = torch.where(finite, 0, log_ratio).detach()
    return (p * torch.where(finite, log_ratio, 0) + infinite_part).sum(dim=1)


def _entropy(logp: Tensor) -> Tensor:
    """Return the entropy of each row, [N], of log-probabilities [N, V]."""
    p = logp.exp()
    return -(p * torch.where(p > 0, logp, 0)).sum(dim=1)


def divergences(kd: str, logp: Tensor, logq: Tensor, alpha: float) -> tuple[Tensor, Tensor | None]:
    """Return kl and forward_kl of each row, [N], of log-probabilities [N, V] or of buckets."""
    if kd == "rkl+fkl":
        return kl_divergence(logp, logq), kl_divergence(logq, logp)
    if kd == "rkl":
        return kl_divergence(logp, logq), None
    if kd == "fkl":
        return kl_divergence(logq, logp), None
    m = alpha * logq.exp() + (1 - alpha) * logp.exp()
    logm = torch.where(m > 0, m, 1).log()
    return alpha * kl_divergence(logq, logm) + (1 - alpha) * kl_divergence(logp, logm), None


def topk_divergence(call: LossCall, outputs: RowOutputs, rows: RowSet) -> Tensor:
    """Return the divergence of each row over K tokens and, with a tail, all others as one."""
    assert isinstance(call.loss, Objective)
    assert call.loss.topk_kd is not None
    logp, logq, logr = call.topk_logprobs(outputs, rows)
    if logr is not None:
        logp, logq = with_tail(logp, logq, logr)
    kd = call.loss.topk_kd.removeprefix("topk_")
    return divergences(kd, logp, logq, call.loss.jsd_alpha)[0]


def row_outputs(
    student: Head,
    tokens: Tensor,
    vocab_size: int,
    *,
    teacher: Head | None = None,
    kd: str | None = None,
    jsd_alpha: float = 0.5,
    entropy: bool = False,
    lse: bool = False,
    teacher_entropy: bool = False,
    truncation: Truncation | None = None,
    extra_tokens: Tensor | None = None,
    rest: bool = False,
    topk: int = 0,
) -> RowOutputs:
    """Return what a loss may use of each row, differentiable in the student's tensors."""
    z = head_logits(student, vocab_size)
    if truncation is not None:
        kept = truncate_(z.detach().clone(), tokens, 1.0, truncation)
        left_out = (kept == -torch.inf).scatter(1, tokens[:, None], False)
        z = torch.where(left_out, -torch.inf, z)
    logp, log_sum_exp = torch.log_softmax(z, dim=1), z.logsumexp(dim=1) if lse else None
    logprobs = logp.gather(1, tokens[:, None]).squeeze(1)
    entropies = _entropy(logp) if entropy else None
    outputs = RowOutputs(logprobs, entropies, lse=log_sum_exp)
    if topk:
        best = z.detach().sort(dim=1, descending=True, stable=True)
        extra_tokens = best.indices.masked_fill(best.values == -torch.inf, -1)[:, :topk]
        outputs = replace(outputs, topk_tokens=extra_tokens)
    if extra_tokens is not None:
        outputs = replace(outputs, **_at_ids(z, logp, extra_tokens, rest))
    if teacher is None:
        return outputs
    logq = torch.log_softmax(head_logits(teacher, vocab_size), dim=1).to(logp)
    kl, forward_kl = (None, None) if kd is None else divergences(kd, logp, logq, jsd_alpha)
    lq = logq.gather(1, tokens[:, None]).squeeze(1)
    outputs = replace(outputs, teacher_logprobs=lq, kl=kl, forward_kl=forward_kl)
    return replace(outputs, teacher_entropy=_entropy(logq) if teacher_entropy else None)


def _at_ids(z: Tensor, logp: Tensor, ids: Tensor, rest: bool) -> dict[str, Tensor]:
    """Return extra_logprobs [N, K] and, if wanted, rest_logprob [N]; -inf and 0 are constants."""
    none, columns = ids < 0, ids.clamp(min=0)
    extra = logp.gather(1, columns)
    constant = none | (extra == -torch.inf)
    results = {"extra_logprobs": torch.where(constant, extra.detach().masked_fill(none, 0), extra)}
    if rest:
        hits = torch.zeros_like(z).scatter_add(1, columns, (~none).to(z))
        others = z.masked_fill(hits > 0, -torch.inf)
        dead = (others == -torch.inf).all(dim=1)
        others = torch.where(dead[:, None], 0, others).logsumexp(dim=1) - z.logsumexp(dim=1)
        others = torch.where(none.all(dim=1), 0, others)
        results["rest_logprob"] = log_mass(torch.where(dead, -torch.inf, others))
    return results


def linear_logprobs(call: LogprobCall) -> RowOutputs:
    """Return the outputs of each row, differentiable in hidden, weight and bias."""
    head, V, ids = call.head, call.head.weight.shape[0], call.extra_tokens
    check_head_values(head)
    bad = bad_tokens(call.tokens, V, "V") + bad_ids(ids, V, "V")
    outputs = row_outputs(
        head,
        call.tokens.clamp(0, V - 1),
        V,
        entropy=call.entropy,
        truncation=call.truncation,
        extra_tokens=None if ids is None else ids.clamp(-1, V - 1),
        rest=call.rest,
        topk=call.topk,
    )
    poisoned = replace(outputs, entropy=None, topk_tokens=None).map(lambda x: poison(x, bad))
    # these two read no token
    return replace(poisoned, entropy=outputs.entropy, topk_tokens=outputs.topk_tokens)


def loss(call: LossCall) -> tuple[Tensor, RowOutputs, Tensor]:
    """Return the 0-d loss, differentiable; row outputs; counts as in one_pass.Pass."""
    call = call.of_shapes()
    bad = check_values(call)
    check_topk_values(call)
    active = call.active_rows()
    ids = call.extra_tokens
    outputs = row_outputs(
        call.student.select(active),
        take(call.tokens.clamp(0, call.vocab_size - 1), active),
        call.vocab_size,
        teacher=None if call.teacher is None else call.teacher.select(active),
        kd=call.exact_kd,
        jsd_alpha=call.loss.jsd_alpha,
        entropy=call.wants_entropy,
        lse=call.loss.lse,
        teacher_entropy=call.loss.teacher_entropy,
        truncation=call.truncation,
        extra_tokens=None if ids is None else take(ids.clamp(-1, call.vocab_size - 1), active),
        rest=call.rest,
    )
    if call.teacher_topk is not None:
        outputs = replace(outputs, kl=topk_divergence(call, outputs, active))
    weights = call.row_weights(active, outputs.logprobs.dtype)
    with without_autocast(weights.device):  # for what a caller's loss computes
        losses = weights * call.loss.losses(call.rows(outputs, active))
    if outputs.logprobs.requires_grad and not losses.requires_grad and len(losses):
        raise ValueError(NO_GRADIENT)
    value = losses.sum() / call.total(weights)
    counts = torch.stack(
        [torch.full_like(bad, len(weights)), _gradient_rows(call, outputs, losses), bad]
    )
    return poison(value, bad), outputs.spread(active, len(call.tokens)), counts


def _gradient_rows(call: LossCall, outputs: RowOutputs, losses: Tensor) -> Tensor:
    """Count the rows that a pass in chunks puts into dX and dW, 0-d int64."""
    if not (call.compact and outputs.logprobs.requires_grad):
        rows = len(losses) if any(call.needs) else 0
        return losses.new_full((), rows, dtype=torch.int64)
    values = (getattr(outputs, field.name) for field in fields(outputs))
    leaves = [x for x in values if x is not None and x.requires_grad]
    derivatives = torch.autograd.grad(losses.sum(), leaves, retain_graph=True, allow_unused=True)
    used = torch.zeros_like(losses, dtype=torch.bool)
    for derivative in derivatives:
        if derivative is not None:
            nonzero = derivative != 0
            used |= nonzero if nonzero.ndim == 1 else nonzero.any(dim=1)
    return used.sum()
