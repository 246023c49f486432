"""Calls as tensors and numbers: schemas, heads, and what stands for None."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import get_type_hints

import torch
from torch import Tensor

from kdrl_kernels.head import Head

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


def schema(arguments: type, *returns: str) -> str:
    """Schema of an operator whose arguments are the fields of a NamedTuple."""
    taken = (f"{SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(arguments).items())
    given = (f"Tensor {name}" for name in returns)
    return f"({', '.join(taken)}) -> ({', '.join(given)})"


def scalars_of(head: Head | None) -> list[float]:
    """[temperature, softcap] of a head; NaN: none."""
    if head is None:
        return [1.0, math.nan]
    temperature = 1.0 if isinstance(head.temperature, Tensor) else float(head.temperature)
    return [temperature, to_number(head.softcap)]


def temperature_of(head: Head | None) -> Tensor | None:
    """[N] temperatures of a head that has one for each row."""
    temperature = None if head is None else head.temperature
    return temperature if isinstance(temperature, Tensor) else None


def join_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    scalars: list[float],
) -> Head:
    """The inverse of _scalars and _temperature."""
    of_head = scalars[0] if temperature is None else temperature
    return Head(hidden, weight, bias, of_head, from_number(scalars[1]))


def to_number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def from_number(value: float) -> float | None:
    return None if math.isnan(value) else value


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns no None."""
    return like.new_empty(0) if tensor is None else tensor


def fake_gradients(
    heads: tuple[Tensor | None, ...], needs: list[bool], like: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    there = (x if need else None for x, need in zip(heads, needs, strict=True))
    return [like.new_empty((0,) if x is None else x.shape, dtype=dtype) for x in there]
