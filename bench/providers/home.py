"""Provides this library, exact and with a sketch, and three baselines in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from bench import definition
from bench.inputs import ADAPTER_SCALE, Inputs
from bench.machine import DEVICE
from bench.ops import Op
from bench.providers import Outputs, Provider
from bench.results_file import OURS, SKETCH

CHUNKS = ({"rows": 1024}, {"rows": 4096}) if DEVICE == "cuda" else ({"rows": 64}, {"rows": 256})


def ours(inputs: Inputs, op: Op, **options: Any) -> Outputs:
    """Call this library as its README does."""
    head: tuple[Tensor, ...] = (inputs.hidden, inputs.shared_weight, inputs.tokens)
    if op.adapter:
        a, b = inputs.adapter_a, inputs.shared_adapter_b
        options |= {"adapter": kk.LowRank(a, b, scale=ADAPTER_SCALE)}
    if not op.gradients:
        with torch.no_grad():
            lp = kk.linear_logprobs(*head, entropy=True, **options)
        assert lp.entropy is not None
        return {"logprobs": lp.logprobs, "entropy": lp.entropy}
    if op.teacher_head:
        options |= {"teacher": _teacher(inputs, op)}
    if op.cross_entropy:
        out = kk.linear_token_loss(*head, lambda rows: -rows.logprobs, **options)
    elif op.entropy_weight:
        options |= {"kl": op.kd, "teacher_entropy": True}
        out = kk.linear_token_loss(*head, _weighted_kl, **options)
    else:
        if op.kd and not op.teacher_head:
            options |= {"teacher_topk": (inputs.teacher_topk_tokens, inputs.teacher_topk_logprobs)}
        out = kk.kdrl_loss(
            *head,
            advantages=definition.advantages(inputs, op) if op.policy else None,
            old_logprobs=inputs.old_logprobs if op.old_logprobs else None,
            objective=kk.Objective(policy="clip" if op.policy else "off", kd=op.kd, kd_coef=1.0),
            compact=op.active < 1 or None,  # on a GPU it must be set
            **options,
        )
    kl = out.kl if out.forward_kl is None else (out.kl + out.forward_kl) / 2
    outputs = {"loss": out.loss, "logprobs": out.logprobs, "kl": kl}
    return {name: value for name, value in outputs.items() if value is not None}


def _teacher(inputs: Inputs, op: Op) -> kk.TeacherHead:
    """Return the teacher; of two their composite, whose weight is from an earlier step."""
    if op.teachers == 1:
        return kk.TeacherHead(inputs.teacher_hidden, inputs.teacher_weight)
    whole = kk.TeacherHead(*inputs.two_teachers)
    pairs = zip(whole.hidden.chunk(2, dim=1), whole.weight.chunk(2, dim=1), strict=True)
    return kk.composite_teacher([kk.TeacherHead(*pair) for pair in pairs], [0.5, 0.5], reuse=whole)


def _weighted_kl(rows: kk.Rows) -> Tensor:
    assert rows.kl is not None
    assert rows.teacher_entropy is not None
    return (-rows.teacher_entropy).exp() * rows.kl


def _sketched(inputs: Inputs, op: Op, **sketch: Any) -> Outputs:
    """Call this library with a sketch of the gradient, at its default threshold."""
    return ours(inputs, op, backward="sketch", sketch=kk.Sketch(**sketch))


def _full_logits(inputs: Inputs, op: Op) -> Outputs:
    """Compute all logits at once, and gradients by autograd: the usual way to write it."""
    with torch.set_grad_enabled(bool(op.gradients)):
        logp = definition.student_logprobs(inputs, op)
        logq = None
        if op.teacher_head:
            with torch.no_grad():
                logq = definition.teacher_logprobs(inputs, op)
        results = definition.row_results(inputs, op, logp, logq)
    if results.losses is None:
        return results.outputs
    return results.outputs | {"loss": results.losses.mean()}


_compiled: dict[str, Any] = {}
"""One compiled function an operation."""


def _full_logits_compiled(inputs: Inputs, op: Op) -> Outputs:
    """Run _full_logits under torch.compile, with one graph an operation."""
    if op.name not in _compiled:

        def call(graph_inputs: Inputs) -> Outputs:
            return _full_logits(graph_inputs, op)

        _compiled[op.name] = torch.compile(call, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1000):  # one for each operation and shape
        return _compiled[op.name](inputs)


def _chunked(inputs: Inputs, op: Op, rows: int) -> Outputs:
    """Take each chunk's gradient while its logits exist, in thirty lines of PyTorch."""
    outputs, gradients = definition.by_rows(inputs, op, inputs.hidden.dtype, rows)
    if not op.gradients:
        return outputs
    leaves = [getattr(inputs, name) for name in op.gradients]
    taken = [gradients.pop(f"d{name}") for name in op.gradients]
    return outputs | {"loss": _Taken.apply(outputs["loss"], taken, *leaves)}


class _Taken(torch.autograd.Function):
    """A loss whose gradients were taken in the forward pass."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, taken: list[Tensor], *leaves: Tensor) -> Tensor:  # noqa: ARG004
        ctx.taken = taken
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        taken, ctx.taken = ctx.taken, None  # another owner, and each would be copied into .grad
        if DEVICE == "cuda" or upstream[0] != 1:  # as this library does: no wait on a GPU
            taken = [gradient.mul_(upstream[0]) for gradient in taken]
        return None, None, *taken


PROVIDERS = (
    Provider(name=OURS, whole=ours),
    Provider(
        name=SKETCH,
        whole=_sketched,
        refused={"logprob + entropy": "without a gradient there is nothing to sketch"},
    ),
    Provider(name="PyTorch, full logits", whole=_full_logits),
    Provider(name="PyTorch, compiled", whole=_full_logits_compiled),
    Provider(name="PyTorch, chunk loop", whole=_chunked, settings=CHUNKS),
)
