"""Lets the public functions take [B, T] batches: flattens arguments, and shapes the outputs."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from kdrl_kernels.head import TeacherHead

P = ParamSpec("P")
R = TypeVar("R")
PER_TOKEN = {"tokens", "mask", "token_weights", "advantages", "old_logprobs", "teacher_logprobs"}
PER_TOKEN |= {"kd_weight", "temperature", "positions"}
"""Arguments that hold one value a token, where they are tensors."""
K_PER_TOKEN = {"extra_tokens", "teacher_topk[0]", "teacher_topk[1]"}
"""Arguments that hold K values a token."""


def takes_batches(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function of [N, H] hidden states take [B, T, H] too, with N = B · T.

    Every tensor of one value a token must then be [B, T], and so are the outputs of [N].
    """
    names = list(signature(function).parameters)
    flat_function: Callable[..., Any] = function

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        hidden = args[0] if args else kwargs.get("hidden")
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            return function(*args, **kwargs)
        B, T, _ = hidden.shape
        flat = [_flat(name, value, B, T) for name, value in zip(names, args, strict=False)]
        options = {name: _flat(name, value, B, T) for name, value in kwargs.items()}
        return _shaped(flat_function(*flat, **options), B, T)

    return wrapper


def _flat(name: str, value: Any, B: int, T: int) -> Any:
    """Return a per-token argument as [B · T, ...], and any other as it is."""
    if name == "hidden":
        return value.flatten(0, 1)
    if isinstance(value, TeacherHead):
        _check("teacher.hidden", value.hidden, B, T, "H_t")
        temperature = _flat("temperature", value.temperature, B, T)
        return replace(value, hidden=value.hidden.flatten(0, 1), temperature=temperature)
    if name == "teacher_topk" and isinstance(value, tuple | list):
        return tuple(_flat(f"{name}[{i}]", part, B, T) for i, part in enumerate(value))
    if name not in PER_TOKEN | K_PER_TOKEN or not isinstance(value, Tensor):
        return value
    _check(name, value, B, T, *["K"] * (name in K_PER_TOKEN))
    return value.flatten(0, 1)


def _check(name: str, tensor: Tensor, B: int, T: int, *dims: str) -> None:
    if tensor.shape[:2] != (B, T) or tensor.ndim != 2 + len(dims):
        sizes = ", ".join(("B", "T", *dims))
        raise ValueError(
            f"{name} must be [{sizes}] with B = {B} and T = {T} where hidden is [B, T, H], "
            f"got {list(tensor.shape)}"
        )


def _shaped(output: Any, B: int, T: int) -> Any:
    """Give the [N] fields of an output the shape [B, T], those of [N, K] the shape [B, T, K]."""
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    rows = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.ndim}
    return replace(output, **{k: v.reshape(B, T, *v.shape[1:]) for k, v in rows.items()})
