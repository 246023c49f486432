"""Defines how a loss of the user's own is declared, and loads the one that method.loss names."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from kdrl_kernels.objective import subtract
from kdrl_kernels.token_rows import Rows
from kdrl_train.errors import import_users
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.losses import MethodLoss, RowLoss, SequenceValues, TokenCoefficients
from kdrl_train.settings import nearest

F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True, slots=True)
class Declared:
    """Holds what a loss of the user's own says that it reads."""

    kd: str | None
    entropy: bool
    sequence: SequenceValues | None


def token_loss(
    *, kd: str | None = None, entropy: bool = False, sequence: SequenceValues | None = None
) -> Callable[[F], F]:
    """Declare a function as a loss for `method.loss`: loss(rows, tokens, **options) -> [C].

    rows is a kdrl_kernels.Rows: logprobs carries the gradient, and so do entropy, kl and forward_kl
    where they are declared. old_logprobs (the policy's own where it is strictly on-policy, so that
    exp(logprobs - old_logprobs) is 1 with the gradient of log p), advantages and kd_weight are
    constants. tokens is a TokenCoefficients. options are the numbers of method.loss_options.

    Args:
        kd: what it reads of the teacher, as method.kd must be set: "k2": rows.teacher_logprobs;
            "rkl", "fkl" or "jsd": rows.kl too; "rkl+fkl": KL(p‖q) in rows.kl and KL(q‖p) in
            rows.forward_kl. None: no teacher. In a row of kd_weight 0 the teacher's log-probability
            is the policy's and each divergence is 0.
        entropy: whether it reads rows.entropy.
        sequence: (log_ratio [N], tokens of the whole pack) -> [N] constants, which come back as
            tokens.sequence; log_ratio is logprobs - old_logprobs. A pack holds whole completions.
            Where completions are not strictly on-policy it costs one more product with the head.
    """

    def declare(function: F) -> F:
        function.kdrl_declared = Declared(kd, entropy, sequence)  # type: ignore[attr-defined]
        return function

    return declare


def load_loss(method: MethodConfig) -> MethodLoss | None:
    """Import the loss that method.loss names; None where it names none.

    Raises: ValueError for what cannot be imported or is not declared by token_loss, for another
        method.kd than it declares, and for options that it does not take.
    """
    name = method.loss
    if name is None:
        return None
    rule = f"method.loss must be module:function, got {name!r}"
    module_name, colon, function_name = name.partition(":")
    if not (colon and function_name and all(map(str.isidentifier, module_name.split(".")))):
        raise ValueError(rule)
    module = import_users(module_name, rule)
    function = getattr(module, function_name, None)
    declared = getattr(function, "kdrl_declared", None)
    if not isinstance(declared, Declared) or function is None:
        raise ValueError(
            f"{rule}: {function_name} of {module_name} must be a function under "
            "@kdrl_train.method.own_loss.token_loss(...), which says what it reads"
        )
    if declared.kd != method.kd:
        raise ValueError(
            f"method.kd must be {shown(declared.kd)}, as method.loss {name} declares, got "
            f"{shown(method.kd)}: set method.kd, or declare the other one"
        )
    check_options(name, function, method.loss_options)
    loss: RowLoss = partial(function, **method.loss_options)
    return MethodLoss(as_declared(loss, declared), declared.sequence)


def shown(kd: str | None) -> str:
    """Write a value of method.kd for a message."""
    return "None" if kd is None else f'"{kd}"'


def check_options(name: str, function: Callable[..., Any], options: Mapping[str, float]) -> None:
    """Raise ValueError for options that a loss does not take, and for those that it lacks."""
    _, _, *parameters = inspect.signature(function).parameters.values()
    taken = {p.name: p.default is p.empty for p in parameters}
    for option in options:
        if option not in taken:
            raise ValueError(
                f"method.loss_options must be of {', '.join(taken) or 'none'} for method.loss "
                f"{name}, got {option}{nearest(option, taken)}"
            )
    lacking = [option for option, required in taken.items() if required and option not in options]
    if lacking:
        raise ValueError(
            f"method.loss_options must set {', '.join(lacking)} for method.loss {name}, got "
            f"{', '.join(options) or 'none'}"
        )


def as_declared(loss: RowLoss, declared: Declared) -> RowLoss:
    """Give a loss of the user's own the rows that token_loss promises."""

    def losses(rows: Rows, tokens: TokenCoefficients) -> Tensor:
        student = rows.logprobs.detach()
        nothing = 0 * subtract(rows.logprobs, student)  # of a gradient, which a loss must have
        off = tokens.kd_weight == 0
        more: dict[str, Any] = {"teacher_logprobs": None}
        if declared.kd is not None:
            teacher = student if rows.teacher_logprobs is None else rows.teacher_logprobs
            more["teacher_logprobs"] = torch.where(off, student, teacher)
            for field in _DIVERGENCES.get(declared.kd, ()):
                value = getattr(rows, field)
                more[field] = nothing if value is None else torch.where(off, 0, value)
        if not declared.entropy:
            more["entropy"] = None
        if rows.old_logprobs is None:
            more["old_logprobs"] = student
        return loss(replace(rows, **more), tokens)

    return losses


_DIVERGENCES: Mapping[str, tuple[str, ...]] = {
    "rkl": ("kl",),
    "fkl": ("kl",),
    "jsd": ("kl",),
    "rkl+fkl": ("kl", "forward_kl"),
}
"""Which fields of Rows an exact method.kd sets."""
