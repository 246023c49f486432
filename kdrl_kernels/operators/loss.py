"""kdrl::loss: the gradient comes out of its forward pass and is saved for backward."""

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrl_kernels import one_pass
from kdrl_kernels.call import LossCall, RowTerms
from kdrl_kernels.objective import EXACT_KD, Objective
from kdrl_kernels.operators.flat import (
    as_given,
    fake_gradients,
    from_number,
    join_head,
    or_empty,
    scalars_of,
    schema,
    temperature_of,
    to_number,
)
from kdrl_kernels.plan import accumulator

NAMES = ("policy", "kd", "kd_baseline")
NUMBERS = [field.name for field in fields(Objective) if field.name not in NAMES]


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
    kd_baseline: str | None
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
            teacher = join_head(
                self.teacher_hidden,
                self.teacher_weight,
                self.teacher_bias,
                self.teacher_temperature,
                self.teacher_scalars,
            )
        numbers: dict[str, Any] = dict(zip(NUMBERS, map(from_number, self.objective), strict=True))
        names: dict[str, Any] = {name: getattr(self, name) for name in NAMES}
        return LossCall(
            student=join_head(self.hidden, self.weight, self.bias, self.temperature, self.scalars),
            tokens=self.tokens,
            vocab_size=self.vocab_size,
            loss=Objective(**names, **numbers),
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
        temperature=temperature_of(student),
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
        teacher_temperature=temperature_of(teacher),
        scalars=scalars_of(student),
        teacher_scalars=scalars_of(teacher),
        policy=objective.policy,
        kd=objective.kd,
        kd_baseline=objective.kd_baseline,
        objective=[to_number(getattr(objective, name)) for name in NUMBERS],
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


@torch.library.custom_op("kdrl::loss", mutates_args=(), schema=schema(LossArguments, *LOSS_RETURNS))
def _loss(*args: Any) -> tuple[Tensor, ...]:
    given = LossArguments(*args)
    hidden_need, weight_need, bias_need = given.needs
    with as_given(given.hidden.device):
        result = one_pass.run(given.call(), given.impl, (hidden_need, weight_need, bias_need))
    terms, lp = result.terms, result.terms.logprobs
    return (
        result.loss,
        lp,
        *(or_empty(x, lp) for x in (terms.entropy, terms.teacher_logprobs, terms.kl)),
        result.counts,
        *(or_empty(x, lp) for x in result.gradients.tensors()),
        result.scale,
    )


@_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    given = LossArguments(*args)
    hidden, (N,), dtype = given.hidden, given.tokens.shape, accumulator(given.hidden.dtype)
    entropy = given.entropy or given.objective[NUMBERS.index("entropy_coef")] != 0
    teacher = given.teacher_hidden is not None
    kl = given.kd in EXACT_KD or given.kd_baseline is not None
    heads = (hidden, given.weight, given.bias)
    return (
        hidden.new_empty((), dtype=dtype),
        *(
            hidden.new_empty(N if there else 0, dtype=dtype)
            for there in (True, entropy, teacher, kl)
        ),
        given.tokens.new_empty(3),
        *fake_gradients(heads, given.needs, hidden, dtype),
        hidden.new_empty((), dtype=dtype),
    )


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
    again = traced or torch._C._autograd._get_current_graph_task_keep_graph()
    if again or one_pass.needs_scaling(gradient, scale, dtype):
        return _scaled(gradient, scale, dtype)
    return gradient  # nobody asks for it a second time


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
