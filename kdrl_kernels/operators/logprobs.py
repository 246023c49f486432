"""The operator kdrl::linear_logprobs and its backward pass, which is an operator too."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from kdrl_kernels import logprobs, scaling
from kdrl_kernels.autocast import without_autocast
from kdrl_kernels.call import LogprobCall, RowOutputs
from kdrl_kernels.chunks import accumulator, padded
from kdrl_kernels.head import gradient_dtypes, gradient_sizes
from kdrl_kernels.logprobs import BackwardCall, Scores
from kdrl_kernels.operators.flat import Layout, fake, no_none, no_vmap

LAYOUT, BACKWARD_LAYOUT = Layout(LogprobCall), Layout(BackwardCall)
SCHEMA = LAYOUT.schema(*(field.name for field in fields(Scores)))
BACKWARD_SCHEMA = BACKWARD_LAYOUT.schema("dhidden", "dweight", "dbias")


@torch.library.custom_op("kdrl::linear_logprobs", mutates_args=(), schema=SCHEMA)
def _linear_logprobs(*values: Any) -> tuple[Tensor, ...]:
    call = LAYOUT.rebuild(values)
    with without_autocast(call.tokens.device):
        scores = logprobs.score(call)
    outputs = (getattr(scores, field.name) for field in fields(Scores))
    return tuple(no_none(outputs, like=scores.logprobs))


@_linear_logprobs.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    call = LAYOUT.rebuild(values)
    hidden, N = call.head.hidden, call.tokens.shape
    cache = call.cached, padded(call.head.weight.shape[0])
    best = call.tokens.new_empty(*N, call.topk) if call.topk else None
    chosen = call.extra_tokens if best is None else best
    ids = None if chosen is None else chosen.shape
    sizes = [N, N, N, N if call.entropy else None, ids, N if call.rest else None, cache]
    outputs = fake(hidden, accumulator(hidden.dtype), sizes)
    return *outputs, *no_none([best], like=outputs[0])


@torch.library.custom_op("kdrl::linear_logprobs_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _linear_logprobs_backward(*values: Any) -> tuple[Tensor, ...]:
    call = BACKWARD_LAYOUT.rebuild(values)
    hidden = call.forward.head.hidden
    with without_autocast(hidden.device):
        total, scale = logprobs.gradients(call)
        pairs = zip(total.tensors(), gradient_dtypes(call.forward.head), strict=True)
        impl = call.forward.impl
        results = (x if x is None else scaling.scaled_(x, scale, dtype, impl) for x, dtype in pairs)
        return tuple(no_none(results, like=hidden))


@_linear_logprobs_backward.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    forward = BACKWARD_LAYOUT.rebuild(values).forward
    head = forward.head
    pairs = zip(gradient_dtypes(head), gradient_sizes(head, forward.needs), strict=True)
    results = (None if n is None else head.hidden.new_empty(n, dtype=dtype) for dtype, n in pairs)
    return tuple(no_none(results, like=head.hidden))


def save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor | None, ...]) -> None:
    """Save the tensors where autograd watches over them, and what else was passed."""
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *output)
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)


def saved(ctx: Any) -> tuple[LogprobCall, Scores]:
    """Return the call and the scores that were saved."""
    values = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
    inputs, scores = values[: len(ctx.others)], values[len(ctx.others) :]
    pairs = zip(inputs, ctx.others, strict=True)
    call = LAYOUT.rebuild(other if tensor is None else tensor for tensor, other in pairs)
    return call, Scores(*scores)


def _backward(ctx: Any, grad_logprobs: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
    call, scores = saved(ctx)
    grad_entropy = grads[2] if call.entropy else None
    grad_extra = grads[3] if call.has_ids else None
    others = grad_entropy, grad_extra, grads[4] if call.rest else None
    if grad_logprobs is None and all(grad is None for grad in others):
        return LAYOUT.head_gradients([None] * 3)
    grad_logprobs = torch.zeros_like(scores.logprobs) if grad_logprobs is None else grad_logprobs
    if call.topk:
        call = replace(call, extra_tokens=scores.topk_tokens)
    backward = BackwardCall(call, scores, grad_logprobs, *others)
    results = _linear_logprobs_backward(*BACKWARD_LAYOUT.flatten(backward))
    pairs = zip(results, call.needs, strict=True)
    return LAYOUT.head_gradients(gradient if need else None for gradient, need in pairs)


_linear_logprobs.register_autograd(_backward, setup_context=save)
_linear_logprobs.register_vmap(no_vmap)


def linear_logprobs(call: LogprobCall) -> RowOutputs:
    """Return the outputs of each row, differentiable once in the head's tensors."""
    lp, _, _, entropy, extra, rest, _, topk_tokens = _linear_logprobs(*LAYOUT.flatten(call))
    return RowOutputs(
        lp,
        entropy if call.entropy else None,
        extra_logprobs=extra if call.has_ids else None,
        rest_logprob=rest if call.rest else None,
        topk_tokens=topk_tokens if call.topk else None,
    )
