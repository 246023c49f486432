"""The definition: eager PyTorch with full [N, V] logits and autograd. Any device and float dtype.

float64 inputs are the measuring stick of the tests; lower precisions are computed in float32.
"""

import torch
from torch import Tensor

from kdrl_kernels.call import LossCall, RowTerms
from kdrl_kernels.head import Head
from kdrl_kernels.objective import token_losses


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
        temperature = temperature.to(dtype)[:, None]
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
    entropy: bool = False,
) -> RowTerms:
    """Every per-token quantity a loss may use, differentiable in the student's tensors."""
    logp = head_logprobs(student, vocab_size)
    logprobs = logp.gather(1, tokens[:, None]).squeeze(1)
    p = logp.exp()
    entropies = -(p * torch.where(p > 0, logp, 0)).sum(dim=1) if entropy else None
    if teacher is None:
        return RowTerms(logprobs, entropies)
    logq = head_logprobs(teacher, vocab_size).to(logp)
    kl = None
    if kd == "rkl":
        kl = kl_divergence(logp, logq)
    elif kd == "fkl":
        kl = kl_divergence(logq, logp)
    return RowTerms(logprobs, entropies, logq.gather(1, tokens[:, None]).squeeze(1), kl)


def kdrl_loss(call: LossCall) -> tuple[Tensor, RowTerms]:
    """(0-d loss, row terms), both differentiable in hidden, weight and bias."""
    terms = row_terms(
        call.student,
        call.tokens,
        call.vocab_size,
        teacher=call.teacher,
        kd=call.objective.kd,
        entropy=call.wants_entropy,
    )
    losses = token_losses(call.objective, call.rows(terms))
    return (call.weights * losses).sum() / call.normalizer, terms
