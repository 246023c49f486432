"""The operator kdrl::loss: its forward pass computes the gradients, its backward scales them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels import one_pass, scaling
from kdrl_kernels.autocast import without_autocast
from kdrl_kernels.call import LossCall, RowOutputs
from kdrl_kernels.chunks import accumulator
from kdrl_kernels.head import gradient_dtypes, gradient_sizes
from kdrl_kernels.objective import Objective
from kdrl_kernels.operators.flat import Layout, fake, no_none, no_vmap


@dataclass(frozen=True, slots=True)
class ObjectiveCall(LossCall):
    """Narrows a LossCall to what an operator takes: no loss that is a caller's function."""

    loss: Objective


LAYOUT = Layout(ObjectiveCall)
ROWS = ["logprobs", "entropy", "teacher_logprobs", "kl", "forward_kl"]
ROWS += ["extra_logprobs", "rest_logprob"]
SCHEMA = LAYOUT.schema("loss", "counts", *ROWS, "dhidden", "dweight", "dbias", "scale")


@torch.library.custom_op("kdrl::loss", mutates_args=(), schema=SCHEMA)
def _loss(*values: Any) -> tuple[Tensor, ...]:
    call = LAYOUT.rebuild(values)
    with without_autocast(call.tokens.device):
        result = one_pass.run(call)
    rows = (getattr(result.rows, name) for name in ROWS)
    optional = no_none((*rows, *result.gradients.tensors()), like=result.loss)
    return result.loss, result.counts, *optional, result.scale


@_loss.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    call = LAYOUT.rebuild(values)
    hidden, N = call.student.hidden, call.tokens.shape
    rows = [N if name in call.row_outputs else None for name in ROWS]
    if call.extra_tokens is not None:
        rows[ROWS.index("extra_logprobs")] = call.extra_tokens.shape
    sizes = [(), *rows, *gradient_sizes(call.student, call.needs), ()]
    loss, *others = fake(hidden, accumulator(hidden.dtype), sizes)
    if call.direct:
        others[-3] = others[-3].to(call.student.weight.dtype)
    return loss, call.tokens.new_empty(3), *others


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = LAYOUT.rebuild(inputs)
    ctx.needs, ctx.dtypes = call.needs, gradient_dtypes(call.student)
    ctx.impl = call.impl
    ctx.save_for_backward(*output[-4:])  # gradients and scale
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad_loss is None:
        return LAYOUT.head_gradients([None] * 3)
    *gradients, scale = ctx.saved_tensors
    scale = scale * grad_loss
    parts = zip(gradients, ctx.needs, ctx.dtypes, strict=True)
    return LAYOUT.head_gradients(
        rounded(x, scale, dtype, ctx.impl) if need else None for x, need, dtype in parts
    )


def rounded(gradient: Tensor, scale: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    """Return gradient · scale in dtype: gradient itself where no later pass reads it.

    So no second copy of a float32 dW is held, which is most of what a small model would hold.
    """
    traced = type(scale) is not Tensor or torch.compiler.is_compiling()
    again = traced or torch._C._autograd._get_current_graph_task_keep_graph()
    if again or torch.is_grad_enabled() or gradient.dtype != dtype:
        return _scaled(gradient, scale, dtype, impl)
    return scaling.scale_(gradient, scale, impl)


_loss.register_autograd(_backward, setup_context=_save)
_loss.register_vmap(no_vmap)


@torch.library.custom_op("kdrl::scaled", mutates_args=())
def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    return scaling.scaled(gradient, scale, dtype, impl)


@_scaled.register_fake
def _(gradient: Tensor, scale: Tensor, dtype: torch.dtype, impl: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(gradient, dtype=dtype)


def kdrl_loss(call: LossCall) -> tuple[Tensor, RowOutputs, Tensor]:
    """Return the 0-d loss, differentiable once in hidden, weight and bias; row outputs; counts."""
    loss, counts, *others = _loss(*LAYOUT.flatten(call))  # type: ignore[arg-type]
    rows = dict(zip(ROWS, others, strict=False))
    return loss, RowOutputs(**{name: rows[name] for name in call.row_outputs}), counts
