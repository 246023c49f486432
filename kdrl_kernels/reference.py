"""The definition: eager PyTorch with full [N, V] logits and autograd. Any device and float dtype.

float64 inputs are the measuring stick of the tests; lower precisions are computed in float32.
"""

import torch
from torch import Tensor

from kdrl_kernels.call import LossCall, RowOutputs, take
from kdrl_kernels.checks import bad_tokens, check_head_values, check_values, poison
from kdrl_kernels.head import Head
from kdrl_kernels.objective import NO_GRADIENT


def head_logprobs(head: Head, vocab_size: int) -> Tensor:
    """log_softmax of the head's first vocab_size columns, [N, vocab_size], float32 or float64."""
    dtype = torch.promote_types(head.hidden.dtype, torch.float32)
    logits = head.hidden.to(dtype) @ head.weight[:vocab_size].to(dtype).T
    if head.bias is not None:
        logits = logits + head.bias[:vocab_size].to(dtype)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    temperature = head.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(dtype)[:, None]
    return torch.log_softmax(logits / temperature, dim=1)


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p‖q) of each row, [N], from log-probabilities [N, V]; a column with p = 0 counts 0.

    An infinite term is a constant, so that a row of KD weight 0 keeps a gradient of 0, not NaN.
    """
    p = logp.exp()
    gap = torch.where(p > 0, logp - logq, 0)
    finite = gap.isfinite()
    return (p * torch.where(finite, gap, 0) + torch.where(finite, 0, gap).detach()).sum(dim=1)


def row_terms(
    student: Head,
    tokens: Tensor,
    vocab_size: int,
    *,
    teacher: Head | None = None,
    kd: str | None = None,
    jsd_alpha: float = 0.5,
    entropy: bool = False,
) -> RowOutputs:
    """Every per-token quantity a loss may use, differentiable in the student's tensors."""
    logp = head_logprobs(student, vocab_size)
    logprobs = logp.gather(1, tokens[:, None]).squeeze(1)
    p = logp.exp()
    entropies = -(p * torch.where(p > 0, logp, 0)).sum(dim=1) if entropy else None
    if teacher is None:
        return RowOutputs(logprobs, entropies)
    logq = head_logprobs(teacher, vocab_size).to(logp)
    kl = None
    if kd == "rkl":
        kl = kl_divergence(logp, logq)
    elif kd == "fkl":
        kl = kl_divergence(logq, logp)
    elif kd == "jsd":
        m = jsd_alpha * logq.exp() + (1 - jsd_alpha) * p
        logm = torch.where(m > 0, m, 1).log()
        kl = jsd_alpha * kl_divergence(logq, logm) + (1 - jsd_alpha) * kl_divergence(logp, logm)
    return RowOutputs(logprobs, entropies, logq.gather(1, tokens[:, None]).squeeze(1), kl)


def linear_logprobs(head: Head, tokens: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """(logprobs [N], entropy [N] or None), differentiable in hidden, weight and bias."""
    check_head_values(head)
    V = head.weight.shape[0]
    bad = bad_tokens(tokens, V, "V")
    terms = row_terms(head, tokens.clamp(0, V - 1), V, entropy=entropy)
    return poison(terms.logprobs, bad), terms.entropy


def loss(call: LossCall) -> tuple[Tensor, RowOutputs, Tensor]:
    """(0-d loss, row terms, counts as one_pass.Pass); differentiable in hidden, weight and bias."""
    bad = check_values(call)
    active = call.active_rows()
    terms = row_terms(
        call.student.select(active),
        take(call.tokens.clamp(0, call.vocab_size - 1), active),
        call.vocab_size,
        teacher=None if call.teacher is None else call.teacher.select(active),
        kd=call.exact_kd,
        jsd_alpha=call.loss.jsd_alpha,
        entropy=call.wants_entropy,
    )
    weights = call.row_weights(active, terms.logprobs.dtype)
    losses = call.loss.losses(call.rows(terms, active))
    if terms.logprobs.requires_grad and not losses.requires_grad and len(losses):
        raise ValueError(NO_GRADIENT)
    value = (weights * losses).sum() / call.total(weights)
    counts = torch.stack([torch.full_like(bad, len(weights)) for _ in range(2)] + [bad])
    return poison(value, bad), terms.spread(active, len(call.tokens)), counts
