"""A caller's own per-token loss as autograd: a Python function, which no operator can take."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdrl_kernels import one_pass
from kdrl_kernels.call import LossCall, RowTerms
from kdrl_kernels.library import as_given


class _TokenLoss(torch.autograd.Function):
    """hidden, weight, bias -> loss; the gradients are taken here, and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,  # noqa: ARG004 (an input of the graph; call.student holds it)
        bias: Tensor | None,  # noqa: ARG004 (the same)
        call: LossCall,
        impl: str,
        needs: one_pass.Needs,
        found: list[one_pass.Pass],
    ) -> Tensor:
        with as_given(hidden.device):
            result = one_pass.run(call, impl, needs)
        found.append(result)
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*result.gradients.tensors(), result.scale)
        return result.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, scale = ctx.saved_tensors
        scale = scale * grad_loss
        found = (
            one_pass.scaled(x, scale, ctx.dtype)
            if x is not None and one_pass.needs_scaling(x, scale, ctx.dtype)
            else x
            for x in gradients
        )
        return *found, None, None, None, None


def token_loss(call: LossCall, impl: str) -> tuple[Tensor, RowTerms, Tensor]:
    """(0-d loss, row terms, counts); the loss is differentiable once in hidden, weight, bias."""
    student, found = call.student, list[one_pass.Pass]()
    needs = one_pass.needs_gradient(student)
    loss = _TokenLoss.apply(student.hidden, student.weight, student.bias, call, impl, needs, found)
    return loss, found[0].terms, found[0].counts
