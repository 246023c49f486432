"""kdrl::linear_logprobs and its backward pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrl_kernels import logprobs, one_pass
from kdrl_kernels.head import Head
from kdrl_kernels.logprobs import Scores
from kdrl_kernels.operators.flat import (
    as_given,
    fake_gradients,
    join_head,
    or_empty,
    scalars_of,
    schema,
    temperature_of,
)
from kdrl_kernels.plan import accumulator, padded


class LogprobArguments(NamedTuple):
    """linear_logprobs, flattened."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: Tensor | None
    scalars: list[float]
    tokens: Tensor
    max_rows: int
    impl: str
    needs: list[bool]
    entropy: bool
    cached: int

    def head(self) -> Head:
        """The Head again."""
        return join_head(self.hidden, self.weight, self.bias, self.temperature, self.scalars)


class LogprobBackwardArguments(NamedTuple):
    """The backward pass of linear_logprobs, flattened."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: Tensor | None
    scalars: list[float]
    tokens: Tensor
    max_rows: int
    impl: str
    needs: list[bool]
    scores: list[Tensor]
    grad_logprobs: Tensor
    grad_entropy: Tensor | None


@torch.library.custom_op(
    "kdrl::linear_logprobs",
    mutates_args=(),
    schema=schema(LogprobArguments, "logprobs", "entropy", "max", "log_sum", "cache"),
)
def _linear_logprobs(*args: Any) -> tuple[Tensor, ...]:
    given = LogprobArguments(*args)
    with as_given(given.hidden.device):
        found = logprobs.score(
            given.head(),
            given.tokens,
            entropy=given.entropy,
            impl=given.impl,
            max_rows=given.max_rows,
            cached=given.cached,
        )
    entropy = or_empty(found.entropy, found.logprobs)
    return found.logprobs, entropy, found.max, found.log_sum, found.cache


@_linear_logprobs.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    given = LogprobArguments(*args)
    hidden, (N,), dtype = given.hidden, given.tokens.shape, accumulator(given.hidden.dtype)
    rows = (hidden.new_empty(n, dtype=dtype) for n in (N, N if given.entropy else 0, N, N))
    return *rows, hidden.new_empty((given.cached, padded(given.weight.shape[0])), dtype=dtype)


@torch.library.custom_op(
    "kdrl::linear_logprobs_backward",
    mutates_args=(),
    schema=schema(LogprobBackwardArguments, "dhidden", "dweight", "dbias"),
)
def _linear_logprobs_backward(*args: Any) -> tuple[Tensor, ...]:
    given = LogprobBackwardArguments(*args)
    hidden, (lp, entropy, top, log_sum, cache) = given.hidden, given.scores
    head = join_head(hidden, given.weight, given.bias, given.temperature, given.scalars)
    hidden_need, weight_need, bias_need = given.needs
    with as_given(hidden.device):
        gradients, scale = logprobs.gradients(
            head,
            given.tokens,
            Scores(lp, top, log_sum, None if given.grad_entropy is None else entropy, cache),
            given.grad_logprobs,
            given.grad_entropy,
            impl=given.impl,
            max_rows=given.max_rows,
            needs=(hidden_need, weight_need, bias_need),
        )
        return tuple(
            hidden.new_empty(0) if x is None else one_pass.scaled_(x, scale, hidden.dtype)
            for x in gradients.tensors()
        )


@_linear_logprobs_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    given = LogprobBackwardArguments(*args)
    heads = (given.hidden, given.weight, given.bias)
    return tuple(fake_gradients(heads, given.needs, given.hidden, given.hidden.dtype))


def _save_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = LogprobArguments(*inputs)
    head = (given.hidden, given.weight, given.bias, given.temperature)
    ctx.save_for_backward(*head, given.tokens, *output)
    ctx.settings = given.scalars, given.max_rows, given.impl, given.needs
    ctx.entropy = given.entropy
    ctx.set_materialize_grads(False)


def _logprobs_backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    hidden, weight, bias, temperature, tokens, *scores = ctx.saved_tensors
    nothing = [None] * (len(LogprobArguments._fields) - 3)
    grad_entropy = grad_entropy if ctx.entropy else None
    if grad_logprobs is None and grad_entropy is None:
        return None, None, None, *nothing
    scalars, max_rows, impl, needs = ctx.settings
    found = _linear_logprobs_backward(
        *LogprobBackwardArguments(
            hidden=hidden,
            weight=weight,
            bias=bias,
            temperature=temperature,
            scalars=scalars,
            tokens=tokens,
            max_rows=max_rows,
            impl=impl,
            needs=needs,
            scores=scores,
            grad_logprobs=torch.zeros_like(scores[0]) if grad_logprobs is None else grad_logprobs,
            grad_entropy=grad_entropy,
        )
    )
    gradients = (x if need else None for x, need in zip(found, needs, strict=True))
    return *gradients, *nothing


_linear_logprobs.register_autograd(_logprobs_backward, setup_context=_save_logprobs)


def linear_logprobs(
    head: Head, tokens: Tensor, *, entropy: bool, impl: str, max_rows: int, cached: int
) -> tuple[Tensor, Tensor | None]:
    """(logprobs [N], entropy [N] or None), differentiable once in hidden, weight and bias."""
    lp, entropies, *_ = _linear_logprobs(
        *LogprobArguments(
            hidden=head.hidden,
            weight=head.weight,
            bias=head.bias,
            temperature=temperature_of(head),
            scalars=scalars_of(head),
            tokens=tokens,
            max_rows=max_rows,
            impl=impl,
            needs=list(one_pass.needs_gradient(head)),
            entropy=entropy,
            cached=cached,
        )
    )
    return lp, entropies if entropy else None
