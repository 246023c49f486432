"""Defines each operation by its formula in plain PyTorch over log-probabilities [C, V].

Every comparison is with this in float64. The baselines of providers/home.py are this in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.inputs import ADAPTER_SCALE, LEAVES, Inputs
from bench.ops import Op
from kdrl_kernels import gemm

CLIP = 0.2
"""Clip range of the ratio, on both sides of 1."""
ALL = slice(None)
TEACHER = ("teacher_hidden", "teacher_weight")
Product = Callable[[Tensor, Tensor], Tensor]
"""Maps hidden [C, H] and weight [V, H] to logits [C, V]."""


def plain_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden · weightᵀ in the dtype of both."""
    return hidden @ weight.T


class NarrowProduct(torch.autograd.Function):
    """Multiplies 16-bit operands into float32, as the GEMM under test does: tensor cores cut off
    what they add, so that their sums are less exact than those of a float32 GEMM."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        out = hidden.new_empty(len(hidden), len(weight))
        gemm.project(hidden.to(dtype), weight.to(dtype), out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ hidden, None


@dataclass(frozen=True, slots=True)
class RowResults:
    """The results of an operation on some rows: outputs [C] and losses [C]."""

    outputs: dict[str, Tensor]
    losses: Tensor | None
    """None for an operation without gradients. The loss of a call is their mean over all rows."""


def advantages(inputs: Inputs, op: Op) -> Tensor:
    """Return the advantages [N] that the operation uses."""
    return inputs.half_advantages if op.active < 1 else inputs.advantages


def policy_loss(lp: Tensor, inputs: Inputs, op: Op, part: slice = ALL) -> Tensor:
    """Return -min(r A, clip(r) A) [C] of the log-probabilities lp [C] of the rows in part."""
    old = inputs.old_logprobs[part] if op.old_logprobs else lp.detach()
    ratio = (lp - old).exp()
    a = advantages(inputs, op)[part]
    return -torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)


def divergence(kd: str, logp: Tensor, logq: Tensor) -> Tensor:
    """Return KL(p‖q) for "rkl", KL(q‖p) for "fkl", Jensen-Shannon for "jsd": [C] nats.

    "rkl+fkl" is the mean of both KLs.
    """
    if kd == "rkl+fkl":
        return (divergence("rkl", logp, logq) + divergence("fkl", logp, logq)) / 2
    if kd == "rkl":
        return (logp.exp() * (logp - logq)).sum(dim=1)
    if kd == "fkl":
        return (logq.exp() * (logq - logp)).sum(dim=1)
    p, q = logp.exp(), logq.exp()
    log_m = ((p + q) / 2).log()
    return (p * (logp - log_m) + q * (logq - log_m)).sum(dim=1) / 2


def topk_reverse_kl(logp: Tensor, inputs: Inputs, part: slice = ALL) -> Tensor:
    """Return KL(p‖q) [C] over the teacher's best tokens, and one bucket for all the others."""
    log_p = _with_rest(logp.gather(1, inputs.teacher_topk_tokens[part]))
    log_q = _with_rest(inputs.teacher_topk_logprobs[part].double()).to(logp.dtype)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def _with_rest(logprobs: Tensor) -> Tensor:
    """Append log(1 - Σ p) to log-probabilities [C, K]; a rest below 1 ulp counts 1 ulp."""
    log_sum = logprobs.logsumexp(dim=1, keepdim=True)
    log_sum = log_sum.clamp(max=-torch.finfo(logprobs.dtype).eps)
    return torch.cat([logprobs, (-log_sum.expm1()).log()], dim=1)


def row_results(
    inputs: Inputs, op: Op, logp: Tensor, logq: Tensor | None, part: slice = ALL
) -> RowResults:
    """Compute the operation on the rows in part from log p and, where there is a teacher, log q."""
    tokens = inputs.tokens[part, None]
    lp = logp.gather(1, tokens).squeeze(1)
    outputs = {"logprobs": lp}
    if not op.gradients:
        return RowResults(outputs | {"entropy": -(logp.exp() * logp).sum(dim=1)}, None)
    losses = -lp if op.cross_entropy else torch.zeros_like(lp)
    if op.policy:
        losses = losses + policy_loss(lp, inputs, op, part)
    if op.kd == "k2":
        assert logq is not None
        losses = losses + (lp - logq.gather(1, tokens).squeeze(1)).square() / 2
    elif op.kd == "topk_rkl":
        outputs["kl"] = topk_reverse_kl(logp, inputs, part)
        losses = losses + outputs["kl"]
    elif op.kd:
        assert logq is not None
        outputs["kl"] = divergence(op.kd, logp, logq)
        weight = (logq.exp() * logq).sum(dim=1).exp() if op.entropy_weight else 1
        losses = losses + weight * outputs["kl"]
    return RowResults(outputs, losses)


def student_logprobs(
    inputs: Inputs, op: Op, part: slice = ALL, product: Product = plain_product
) -> Tensor:
    """Return the student's log-probabilities [C, V] of the rows in part."""
    return log_softmax(student_logits(inputs, op, part, product))


def student_logits(inputs: Inputs, op: Op, part: slice, product: Product) -> Tensor:
    """Return the student's logits [C, V] of the rows in part."""
    hidden = inputs.hidden[part]
    logits = product(hidden, inputs.shared_weight)
    if op.adapter:
        logits.addmm_(ADAPTER_SCALE * (hidden @ inputs.adapter_a.T), inputs.shared_adapter_b.T)
    return logits


def teacher_logprobs(
    inputs: Inputs, op: Op, part: slice = ALL, product: Product = plain_product
) -> Tensor:
    """Return the teacher's log-probabilities [C, V] of the rows in part.

    The mean of two teachers' logits is that of their log-probabilities, but for a constant a row.
    """
    if op.teachers == 1:
        return log_softmax(product(inputs.teacher_hidden[part], inputs.shared_teacher_weight))
    both_hidden, both_weights = inputs.two_teachers
    first, second = both_hidden[part].chunk(2, dim=1)
    first_weight, second_weight = both_weights[: len(inputs.shared_weight)].chunk(2, dim=1)
    logits = product(first, first_weight)
    return log_softmax(logits.addmm_(second, second_weight.T).div_(2))


def log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities [C, V], at least in float32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits, dim=1, dtype=wide)


def typed(inputs: Inputs, op: Op, dtype: torch.dtype) -> Inputs:
    """Return copies in dtype of what the operation multiplies, the leaves as it wants gradients."""
    leaves = {
        name: getattr(inputs, name).detach().to(dtype).requires_grad_(name in op.gradients)
        for name in LEAVES
    }
    heads: tuple[str, ...] = ()
    if op.teacher_head:
        heads = ("both_hidden", "both_weights") if op.teachers == 2 else TEACHER
    return replace(inputs, **leaves, **{name: getattr(inputs, name).to(dtype) for name in heads})


def whole_outputs(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the outputs of all rows; those named "loss" hold the loss of each row."""
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if "loss" in whole:
        whole["loss"] = whole["loss"].mean()
    return whole


def by_rows(
    inputs: Inputs, op: Op, dtype: torch.dtype, rows: int, product: Product = plain_product
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute (outputs, gradients by input name) in dtype, some rows of logits at a time.

    product: computes hidden · weightᵀ.
    """
    typed_inputs = typed(inputs, op, dtype)
    parts: list[dict[str, Tensor]] = []
    N = inputs.shape.N
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        logp = student_logprobs(typed_inputs, op, part, product)
        logq = teacher_logprobs(typed_inputs, op, part, product) if op.teacher_head else None
        results = row_results(inputs, op, logp, logq, part)
        outputs = results.outputs
        if results.losses is not None:
            (results.losses.sum() / N).backward()
            outputs["loss"] = results.losses
        parts.append({name: value.detach() for name, value in outputs.items()})
        del logp, logq, results, outputs  # or the next rows come on top of these
    leaves = {name: getattr(typed_inputs, name) for name in LEAVES}
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return whole_outputs(parts), gradients
