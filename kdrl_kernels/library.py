"""torch.library operators, so that a compiled caller keeps one graph: the calls, flattened.

An operator takes tensors and numbers only. Each runs with autograd and autocast off; the gradient
of kdrl::loss comes out of its forward pass and is saved for backward.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from kdrl_kernels import logprobs, one_pass
from kdrl_kernels.call import LossCall, RowTerms
from kdrl_kernels.head import Head
from kdrl_kernels.logprobs import Scores
from kdrl_kernels.objective import EXACT_KD, Objective
from kdrl_kernels.plan import accumulator, padded

NUMBERS = [field.name for field in fields(Objective) if field.name not in ("policy", "kd")]
SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[float]: "float[]",
    list[bool]: "bool[]",
    str: "str",
    str | None: "str?",
    int: "SymInt",
    bool: "bool",
}


@contextmanager
def as_given(device: torch.device) -> Iterator[None]:
    """Compute in the dtypes given, whatever autocast says, and launch on the tensors' own GPU."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.autocast(device.type, enabled=False):
        yield


def _schema(arguments: type, *returns: str) -> str:
    """Schema of an operator whose arguments are the fields of a NamedTuple."""
    taken = (f"{SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(arguments).items())
    given = (f"Tensor {name}" for name in returns)
    return f"({', '.join(taken)}) -> ({', '.join(given)})"


def _scalars(head: Head | None) -> list[float]:
    """[temperature, softcap] of a head; NaN: none."""
    if head is None:
        return [1.0, math.nan]
    temperature = 1.0 if isinstance(head.temperature, Tensor) else float(head.temperature)
    return [temperature, _number(head.softcap)]


def _temperature(head: Head | None) -> Tensor | None:
    """[N] temperatures of a head that has one for each row."""
    of_rows = isinstance(head, Head) and isinstance(head.temperature, Tensor)
    return head.temperature if of_rows else None  # type: ignore[union-attr, return-value]


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    scalars: list[float],
) -> Head:
    """The inverse of _scalars and _temperature."""
    of_head = scalars[0] if temperature is None else temperature
    return Head(hidden, weight, bias, of_head, _optional(scalars[1]))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _optional(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns no None."""
    return like.new_empty(0) if tensor is None else tensor


class LossArguments(NamedTuple):
    """LossCall, flattened."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: Tensor | None
    tokens: Tensor
    weights: Tensor | None
    normalizer: Tensor | None
    advantages: Tensor | None
    old_logprobs: Tensor | None
    kd_weight: Tensor | None
    teacher_logprobs: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_temperature: Tensor | None
    scalars: list[float]
    teacher_scalars: list[float]
    policy: str
    kd: str | None
    objective: list[float]
    vocab_size: int
    max_rows: int
    entropy: bool
    compact: bool
    impl: str
    needs: list[bool]

    def call(self) -> LossCall:
        """The LossCall again."""
        teacher = None
        if self.teacher_hidden is not None and self.teacher_weight is not None:
            teacher = _head(
                self.teacher_hidden,
                self.teacher_weight,
                self.teacher_bias,
                self.teacher_temperature,
                self.teacher_scalars,
            )
        numbers: dict[str, Any] = dict(zip(NUMBERS, map(_optional, self.objective), strict=True))
        policy: Any = self.policy
        kd: Any = self.kd
        return LossCall(
            student=_head(self.hidden, self.weight, self.bias, self.temperature, self.scalars),
            tokens=self.tokens,
            vocab_size=self.vocab_size,
            loss=Objective(policy=policy, kd=kd, **numbers),
            weights=self.weights,
            normalizer=self.normalizer,
            advantages=self.advantages,
            old_logprobs=self.old_logprobs,
            kd_weight=self.kd_weight,
            teacher=teacher,
            teacher_logprobs=self.teacher_logprobs,
            entropy=self.entropy,
            compact=self.compact,
            max_rows=self.max_rows,
        )


def _flatten(call: LossCall, impl: str) -> LossArguments:
    """The arguments of kdrl::loss for a call."""
    student, teacher, objective = call.student, call.teacher, call.loss
    assert isinstance(objective, Objective)
    return LossArguments(
        hidden=student.hidden,
        weight=student.weight,
        bias=student.bias,
        temperature=_temperature(student),
        tokens=call.tokens,
        weights=call.weights,
        normalizer=call.normalizer,
        advantages=call.advantages,
        old_logprobs=call.old_logprobs,
        kd_weight=call.kd_weight,
        teacher_logprobs=call.teacher_logprobs,
        teacher_hidden=None if teacher is None else teacher.hidden,
        teacher_weight=None if teacher is None else teacher.weight,
        teacher_bias=None if teacher is None else teacher.bias,
        teacher_temperature=_temperature(teacher),
        scalars=_scalars(student),
        teacher_scalars=_scalars(teacher),
        policy=objective.policy,
        kd=objective.kd,
        objective=[_number(getattr(objective, name)) for name in NUMBERS],
        vocab_size=call.vocab_size,
        max_rows=call.max_rows,
        entropy=call.entropy,
        compact=call.compact,
        impl=impl,
        needs=list(one_pass.needs_gradient(student)),
    )


LOSS_RETURNS = (
    *("loss", "logprobs", "entropy", "teacher_logprobs", "kl", "counts"),
    *("dhidden", "dweight", "dbias", "scale"),
)


@torch.library.custom_op(
    "kdrl::loss", mutates_args=(), schema=_schema(LossArguments, *LOSS_RETURNS)
)
def _loss(*args: Any) -> tuple[Tensor, ...]:
    given = LossArguments(*args)
    hidden_need, weight_need, bias_need = given.needs
    with as_given(given.hidden.device):
        result = one_pass.run(given.call(), given.impl, (hidden_need, weight_need, bias_need))
    terms, lp = result.terms, result.terms.logprobs
    return (
        result.loss,
        lp,
        *(_or_empty(x, lp) for x in (terms.entropy, terms.teacher_logprobs, terms.kl)),
        result.counts,
        *(_or_empty(x, lp) for x in result.gradients.tensors()),
        result.scale,
    )


@_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    given = LossArguments(*args)
    hidden, (N,), dtype = given.hidden, given.tokens.shape, accumulator(given.hidden.dtype)
    entropy = given.entropy or given.objective[NUMBERS.index("entropy_coef")] != 0
    teacher = given.teacher_hidden is not None
    heads = (hidden, given.weight, given.bias)
    return (
        hidden.new_empty((), dtype=dtype),
        *(
            hidden.new_empty(N if there else 0, dtype=dtype)
            for there in (True, entropy, teacher, given.kd in EXACT_KD)
        ),
        given.tokens.new_empty(3),
        *_fake_gradients(heads, given.needs, hidden, dtype),
        hidden.new_empty((), dtype=dtype),
    )


def _fake_gradients(
    heads: tuple[Tensor | None, ...], needs: list[bool], like: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    there = (x if need else None for x, need in zip(heads, needs, strict=True))
    return [like.new_empty((0,) if x is None else x.shape, dtype=dtype) for x in there]


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = LossArguments(*inputs)
    ctx.needs, ctx.dtype = given.needs, given.hidden.dtype
    ctx.save_for_backward(*output[-4:])
    ctx.set_materialize_grads(False)


def _loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    nothing = [None] * (len(LossArguments._fields) - 3)
    if grad_loss is None:
        return None, None, None, *nothing
    *gradients, scale = ctx.saved_tensors
    scale = scale * grad_loss
    found = (
        rounded(gradient, scale, ctx.dtype) if need else None
        for gradient, need in zip(gradients, ctx.needs, strict=True)
    )
    return *found, *nothing


def rounded(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · scale in dtype: gradient itself where that is all there is to it."""
    traced = type(scale) is not Tensor  # a graph has no branch on the value of scale
    if traced or one_pass.needs_scaling(gradient, scale, dtype):
        return _scaled(gradient, scale, dtype)
    return gradient


_loss.register_autograd(_loss_backward, setup_context=_save_loss)


@torch.library.custom_op("kdrl::scaled", mutates_args=())
def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return one_pass.scaled(gradient, scale, dtype)


@_scaled.register_fake
def _(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    return torch.empty_like(gradient, dtype=dtype)


def kdrl_loss(call: LossCall, impl: str) -> tuple[Tensor, RowTerms, Tensor]:
    """(0-d loss, row terms, counts); the loss is differentiable once in hidden, weight, bias."""
    loss, lp, *terms, counts, _, _, _, _ = _loss(*_flatten(call, impl))
    there = (call.wants_entropy, call.teacher is not None, call.exact_kd is not None)
    found = (x if t else None for x, t in zip(terms, there, strict=True))
    return loss, RowTerms(lp, *found), counts


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
        return _head(self.hidden, self.weight, self.bias, self.temperature, self.scalars)


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
    schema=_schema(LogprobArguments, "logprobs", "entropy", "max", "log_sum", "cache"),
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
    entropy = _or_empty(found.entropy, found.logprobs)
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
    schema=_schema(LogprobBackwardArguments, "dhidden", "dweight", "dbias"),
)
def _linear_logprobs_backward(*args: Any) -> tuple[Tensor, ...]:
    given = LogprobBackwardArguments(*args)
    hidden, (lp, entropy, top, log_sum, cache) = given.hidden, given.scores
    head = _head(hidden, given.weight, given.bias, given.temperature, given.scalars)
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
    return tuple(_fake_gradients(heads, given.needs, given.hidden, given.hidden.dtype))


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
            temperature=_temperature(head),
            scalars=_scalars(head),
            tokens=tokens,
            max_rows=max_rows,
            impl=impl,
            needs=list(one_pass.needs_gradient(head)),
            entropy=entropy,
            cached=cached,
        )
    )
    return lp, entropies if entropy else None
