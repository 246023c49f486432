"""The benchmarked operations, each as this library computes it and as plain PyTorch does."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kdrl_kernels as kk
from bench.inputs import Inputs
from bench.shapes import Shape


@dataclass(frozen=True, slots=True)
class Op:
    """One call of the library, its gradients, and the GEMMs it cannot do without."""

    name: str
    objective: kk.Objective | None
    """None: log-probability and entropy alone, forward only."""
    frozen_head: bool = False
    """The weight wants no gradient."""
    active: float = 1.0
    """Share of rows with an advantage that is not 0."""
    bar: float | None = None
    """Highest ratio to the floor that the design allows on the CPU."""

    @property
    def gradients(self) -> tuple[str, ...]:
        """Names of the inputs that get one."""
        if self.objective is None:
            return ()
        return ("hidden",) if self.frozen_head else ("hidden", "weight")

    @property
    def kd(self) -> str | None:
        """Distillation term; None without a teacher."""
        return None if self.objective is None else self.objective.kd

    def flop(self, shape: Shape) -> float:
        """FLOP of the GEMMs alone; rows whose gradient is 0 need no gradient GEMM."""
        units = 1 + self.active * len(self.gradients) + (shape.tau if self.kd else 0)
        return units * shape.unit_flop


_GRPO = kk.Objective(kd=None)
OPS = (
    Op("logprob + entropy", None),
    Op("GRPO", _GRPO, bar=1.15),
    Op("reverse KL", kk.Objective(policy="off", kd="rkl", kd_coef=1.0), bar=1.2),
    Op("KDRL exact", kk.Objective(kd="rkl"), bar=1.2),
    Op("KDRL k2", kk.Objective(kd="k2"), bar=1.2),
    Op("GRPO, half at 0", _GRPO, active=0.5),
    Op("GRPO, frozen head", _GRPO, frozen_head=True),
)
OPS_BY_NAME = {op.name: op for op in OPS}


def clear_gradients(inputs: Inputs, op: Op) -> None:
    """No gradients, and requires_grad as the operation has it."""
    inputs.hidden.grad = inputs.weight.grad = None
    inputs.weight.requires_grad_(not op.frozen_head)


def ours(inputs: Inputs, op: Op, workspace_bytes: int | None = None) -> dict[str, Tensor]:
    """The library's call: per-token outputs; gradients are left in .grad of hidden and weight."""
    if op.objective is None:
        with torch.no_grad():
            lp = kk.linear_logprobs(
                inputs.hidden,
                inputs.weight,
                inputs.tokens,
                entropy=True,
                workspace_bytes=workspace_bytes,
            )
        assert lp.entropy is not None
        return {"logprobs": lp.logprobs, "entropy": lp.entropy}
    policy = op.objective.policy != "off"
    out = kk.kdrl_loss(
        inputs.hidden,
        inputs.weight,
        inputs.tokens,
        advantages=_advantages(inputs, op) if policy else None,
        old_logprobs=inputs.old_logprobs if policy else None,
        teacher=kk.TeacherHead(inputs.teacher_hidden, inputs.teacher_weight) if op.kd else None,
        objective=op.objective,
        compact=op.active < 1 or None,  # on a GPU it is asked for
        workspace_bytes=workspace_bytes,
    )
    out.loss.backward()
    found = {"logprobs": out.logprobs, "kl": out.kl}
    return {name: value for name, value in found.items() if value is not None}


def plain(
    inputs: Inputs, op: Op, dtype: torch.dtype = torch.float32, rows: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(per-token outputs, gradients) by autograd through full logits, without the library.

    dtype float64: the measuring stick; rows: at a time, None: all (the usual way to write it).
    """
    leaves = {
        name: getattr(inputs, name).detach().to(dtype).requires_grad_(name in op.gradients)
        for name in ("hidden", "weight")
    }
    t_weight = inputs.teacher_weight.to(dtype) if op.kd else None
    parts: list[dict[str, Tensor]] = []
    for start in range(0, inputs.shape.N, rows or inputs.shape.N):
        part = slice(start, start + (rows or inputs.shape.N))
        logp = _log_softmax(leaves["hidden"][part], leaves["weight"], inputs)
        logq = None
        if t_weight is not None:
            logq = _log_softmax(inputs.teacher_hidden[part].to(dtype), t_weight, inputs)
        found, losses = _plain_losses(inputs, op, part, logp, logq)
        if losses is not None:
            (losses.sum() / inputs.shape.N).backward()
        parts.append({name: value.detach() for name, value in found.items()})
        del logp, logq, found, losses  # or the next rows come on top of these
    outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    gradients = {f"d{name}": leaves[name].grad for name in op.gradients}
    return outputs, {name: value for name, value in gradients.items() if value is not None}


def _log_softmax(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
    V = min(inputs.shape.V, inputs.shape.V_t)
    return F.log_softmax(hidden @ weight[:V].T, dim=1)


def _plain_losses(
    inputs: Inputs, op: Op, part: slice, logp: Tensor, logq: Tensor | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """(per-token outputs, [C] losses or None) of some rows, from log-probabilities [C, V]."""
    tokens = inputs.tokens[part, None]
    lp = logp.gather(1, tokens).squeeze(1)
    found = {"logprobs": lp}
    if op.objective is None:
        found["entropy"] = -(logp.exp() * logp).sum(dim=1)
        return found, None
    objective, losses, scale = op.objective, torch.zeros_like(lp), objective_coef(op)
    if objective.policy == "clip":
        ratio = (lp - inputs.old_logprobs[part]).exp()
        bounded = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
        advantages = _advantages(inputs, op)[part]
        losses = -torch.minimum(ratio * advantages, bounded * advantages)
        scale = scale * ratio.detach().clamp(max=objective.kd_ratio_cap)
    if objective.kd == "k2":
        assert logq is not None
        losses = losses + scale * (lp - logq.gather(1, tokens).squeeze(1)).square() / 2
    if objective.kd == "rkl":
        assert logq is not None
        found["kl"] = (logp.exp() * (logp - logq)).sum(dim=1)
        losses = losses + scale * found["kl"]
    return found, losses


def objective_coef(op: Op) -> float | Tensor:
    """Weight of the KD term, 0 without an objective."""
    return 0.0 if op.objective is None else op.objective.kd_coef


def _advantages(inputs: Inputs, op: Op) -> Tensor:
    return inputs.half_advantages if op.active < 1 else inputs.advantages
