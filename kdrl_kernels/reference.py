"""Defines every loss in eager PyTorch, with full [N, V] logits and autograd, on any device.

The tests measure against float64 inputs; float16 and bfloat16 are computed in float32.
"""

from dataclasses import fields, replace

import torch
from torch import Tensor

from kdrl_kernels.adapter import LowRank
from kdrl_kernels.autocast import Project, without_autocast
from kdrl_kernels.call import LossCall, RowOutputs, take
from kdrl_kernels.caller_loss import NO_GRADIENT
from kdrl_kernels.checks import bad_tokens, check_head_values, check_values, poison
from kdrl_kernels.head import Head, StudentHead, gathered
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
    truncation: Truncation | None = None,
) -> RowOutputs:
    """Return what a loss may use of each row, differentiable in the student's tensors."""
    z = head_logits(student, vocab_size)
    if truncation is not None:
        kept = truncate_(z.detach().clone(), tokens, 1.0, truncation)
        left_out = (kept == -torch.inf).scatter(1, tokens[:, None], False)
        z = torch.where(left_out, -torch.inf, z)
    logp, log_sum_exp = torch.log_softmax(z, dim=1), z.logsumexp(dim=1) if lse else None
    logprobs = logp.gather(1, tokens[:, None]).squeeze(1)
    p = logp.exp()
    entropies = -(p * torch.where(p > 0, logp, 0)).sum(dim=1) if entropy else None
    if teacher is None:
        return RowOutputs(logprobs, entropies, lse=log_sum_exp)
    logq = torch.log_softmax(head_logits(teacher, vocab_size), dim=1).to(logp)
    kl, forward_kl = None, None
    if kd in ("rkl", "rkl+fkl"):
        kl = kl_divergence(logp, logq)
        forward_kl = kl_divergence(logq, logp) if kd == "rkl+fkl" else None
    elif kd == "fkl":
        kl = kl_divergence(logq, logp)
    elif kd == "jsd":
        m = jsd_alpha * logq.exp() + (1 - jsd_alpha) * p
        logm = torch.where(m > 0, m, 1).log()
        kl = jsd_alpha * kl_divergence(logq, logm) + (1 - jsd_alpha) * kl_divergence(logp, logm)
    lq = logq.gather(1, tokens[:, None]).squeeze(1)
    return RowOutputs(logprobs, entropies, lq, kl, forward_kl, log_sum_exp)


def linear_logprobs(
    head: Head, tokens: Tensor, entropy: bool, truncation: Truncation | None
) -> tuple[Tensor, Tensor | None]:
    """Return logprobs [N] and entropy [N] or None, differentiable in hidden, weight and bias."""
    check_head_values(head)
    V = head.weight.shape[0]
    bad = bad_tokens(tokens, V, "V")
    tokens = tokens.clamp(0, V - 1)
    outputs = row_outputs(head, tokens, V, entropy=entropy, truncation=truncation)
    return poison(outputs.logprobs, bad), outputs.entropy


def loss(call: LossCall) -> tuple[Tensor, RowOutputs, Tensor]:
    """Return the 0-d loss, differentiable; row outputs; counts as in one_pass.Pass."""
    call = call.of_shapes()
    bad = check_values(call)
    active = call.active_rows()
    outputs = row_outputs(
        call.student.select(active),
        take(call.tokens.clamp(0, call.vocab_size - 1), active),
        call.vocab_size,
        teacher=None if call.teacher is None else call.teacher.select(active),
        kd=call.exact_kd,
        jsd_alpha=call.loss.jsd_alpha,
        entropy=call.wants_entropy,
        lse=call.loss.lse,
        truncation=call.truncation,
    )
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
        used = used if derivative is None else used | (derivative != 0)
    return used.sum()
