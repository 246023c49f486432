"""Runs a caller's own loss of each token by autograd, since no operator takes a function."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels import one_pass
from kdrl_kernels.autocast import without_autocast
from kdrl_kernels.call import LossCall, RowOutputs
from kdrl_kernels.caller_loss import CallerLoss, refuse_other_leaves
from kdrl_kernels.head import gradient_dtypes
from kdrl_kernels.operators.loss import rounded
from kdrl_kernels.token_rows import Rows
from kdrl_kernels.vocab_shard import VocabShard


class _TokenLoss(torch.autograd.Function):
    """Computes the loss of hidden, weight and bias, and its gradients, which backward scales.

    The gradients are outputs, which depend on the inputs, so that a second derivative raises.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,  # noqa: ARG004 (an input of the graph; call.student holds it)
        bias: Tensor | None,  # noqa: ARG004 (an input of the graph too)
        call: LossCall,
        passes: list[one_pass.Pass],
        shard: VocabShard | None,
    ) -> tuple[Tensor | None, ...]:
        with without_autocast(hidden.device):
            result = one_pass.run(call, shard=shard)
        passes.append(result)
        outputs = *result.gradients.tensors(), result.scale
        ctx.dtypes, ctx.impl = gradient_dtypes(call.student), call.impl
        ctx.save_for_backward(*outputs)
        ctx.set_materialize_grads(False)
        return result.loss, *outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        (*gradients, scale), impl = ctx.saved_tensors, ctx.impl
        if grad_loss is None:
            return (None,) * 6
        scale = scale * grad_loss
        pairs = zip(gradients, ctx.dtypes, strict=True)
        results = (None if x is None else rounded(x, scale, dtype, impl) for x, dtype in pairs)
        return *results, None, None, None


def _without_parameters(fn: Callable[[Rows], Tensor]) -> Callable[[Rows], Tensor]:
    """Make a loss raise where it reads a parameter, for a head without a gradient.

    Where the head has one, the graph of each chunk is searched for parameters anyway.
    """

    def checked(rows: Rows) -> Tensor:
        with torch.enable_grad():
            losses = fn(rows)
        if isinstance(losses, Tensor) and losses.requires_grad:
            refuse_other_leaves(losses, [])
        return losses

    return checked


def token_loss(
    call: LossCall, shard: VocabShard | None = None
) -> tuple[Tensor, RowOutputs, Tensor]:
    """Return the 0-d loss, differentiable once in hidden, weight and bias; row outputs; counts.

    shard: the columns that this rank holds of the vocabulary; None: all.
    """
    call = call.of_shapes()
    student, passes = call.student, list[one_pass.Pass]()
    if torch.is_grad_enabled() and not any(call.needs) and isinstance(call.loss, CallerLoss):
        call = replace(call, loss=replace(call.loss, fn=_without_parameters(call.loss.fn)))
    loss, *_ = _TokenLoss.apply(student.hidden, student.weight, student.bias, call, passes, shard)
    return loss, passes[0].rows, passes[0].counts
