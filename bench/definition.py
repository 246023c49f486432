"""What each operation means: its formula in plain PyTorch over log-probabilities [C, V].

Every comparison is with this, in float64. The home-made baselines are this too, in float32.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.inputs import Inputs
from bench.ops import Op

CLIP = 0.2
"""Of the ratio, on both sides."""
ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Terms:
    """Some rows of an operation: outputs [C] that were computed on the way, and the losses [C]."""

    outputs: dict[str, Tensor]
    losses: Tensor | None
    """None where there is only a forward pass. The loss of a call is their mean over all rows."""


def advantages(inputs: Inputs, op: Op) -> Tensor:
    """[N], the ones this operation uses."""
    return inputs.half_advantages if op.active < 1 else inputs.advantages


def policy_loss(lp: Tensor, inputs: Inputs, op: Op, part: slice = ALL) -> Tensor:
    """-min(r A, clip(r) A) [C] of log-probabilities lp [C], of the rows in part."""
    old = inputs.old_logprobs[part] if op.old_logprobs else lp.detach()
    ratio = (lp - old).exp()
    a = advantages(inputs, op)[part]
    return -torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)


def divergence(kd: str, logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p‖q) for "rkl", KL(q‖p) for "fkl", the Jensen-Shannon divergence for "jsd": [C] nats."""
    if kd == "rkl":
        return (logp.exp() * (logp - logq)).sum(dim=1)
    if kd == "fkl":
        return (logq.exp() * (logq - logp)).sum(dim=1)
    p, q = logp.exp(), logq.exp()
    log_m = ((p + q) / 2).log()
    return (p * (logp - log_m) + q * (logq - log_m)).sum(dim=1) / 2


def terms(inputs: Inputs, op: Op, logp: Tensor, logq: Tensor | None, part: slice = ALL) -> Terms:
    """The operation on the rows in part, given log p and, where there is a teacher, log q."""
    tokens = inputs.tokens[part, None]
    lp = logp.gather(1, tokens).squeeze(1)
    outputs = {"logprobs": lp}
    if not op.gradients:
        return Terms(outputs | {"entropy": -(logp.exp() * logp).sum(dim=1)}, None)
    losses = -lp if op.cross_entropy else torch.zeros_like(lp)
    if op.policy:
        losses = losses + policy_loss(lp, inputs, op, part)
    if op.kd:
        assert logq is not None
        if op.kd == "k2":
            losses = losses + (lp - logq.gather(1, tokens).squeeze(1)).square() / 2
        else:
            outputs["kl"] = divergence(op.kd, logp, logq)
            losses = losses + outputs["kl"]
    return Terms(outputs, losses)


def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    """Log-probabilities [C, V], at least in float32."""
    logits = hidden @ weight.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits, dim=1, dtype=wide)


def by_rows(
    inputs: Inputs, op: Op, dtype: torch.dtype, rows: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(outputs, gradients by input name) computed in dtype, some rows of logits at a time."""
    leaves = {
        name: getattr(inputs, name).detach().to(dtype).requires_grad_(name in op.gradients)
        for name in ("hidden", "weight")
    }
    given = replace(inputs, **leaves)
    t_weight = inputs.shared_teacher_weight.to(dtype) if op.kd else None
    parts: list[dict[str, Tensor]] = []
    N = inputs.shape.N
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        logp = log_softmax(given.hidden[part], given.shared_weight)
        logq = None
        if t_weight is not None:
            logq = log_softmax(inputs.teacher_hidden[part].to(dtype), t_weight)
        found = terms(inputs, op, logp, logq, part)
        outputs = found.outputs
        if found.losses is not None:
            (found.losses.sum() / N).backward()
            outputs["loss"] = found.losses
        parts.append({name: value.detach() for name, value in outputs.items()})
        del logp, logq, found, outputs  # or the next rows come on top of these
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if "loss" in whole:
        whole["loss"] = whole["loss"].mean()
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return whole, gradients
