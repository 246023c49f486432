"""Checks the type of plain arguments, and says which tensors can be read: before anything compares
either."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

NUMBERS = (int, float, Real, torch.SymInt, torch.SymFloat)
INTEGERS = (int, Integral, torch.SymInt)


def kind_of(value: Any) -> str:
    """Return the type of a value that is no tensor, and the remedy for a module."""
    remedy = ": pass its weight" if isinstance(value, torch.nn.Module) else ""
    return type(value).__name__ + remedy


def check_number(name: str, value: Any, *, optional: bool = False, whole: bool = False) -> None:
    """Raise TypeError unless value is a number, an integer where whole; or None where optional."""
    kinds = INTEGERS if whole else NUMBERS
    if (optional and value is None) or (isinstance(value, kinds) and not isinstance(value, bool)):
        return
    what = ("an integer" if whole else "a number") + (" or None" if optional else "")
    raise TypeError(f"{name} must be {what}, got {_shown(value)}")


def check_flag(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise TypeError unless value is True or False, or None where optional."""
    if not (isinstance(value, bool) or (optional and value is None)):
        what = "True, False or None" if optional else "True or False"
        raise TypeError(f"{name} must be {what}, got {_shown(value)}")


def check_bytes(name: str, value: float | None, *, optional: bool = True) -> None:
    """Raise unless value is a number of bytes: above 0 or None where optional, else at least 0."""
    check_number(name, value, optional=optional)
    if value is None or (0 < value < math.inf) or (value == 0 and not optional):
        return
    if value == math.inf:
        raise ValueError(f"{name} must be finite, got inf")
    what = "positive or None" if optional else "at least 0"
    raise ValueError(f"{name} must be {what}, got {value}")


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


def has_values(tensor: Tensor) -> bool:
    """Say whether there is anything to read: a meta tensor and a FakeTensor have shapes alone."""
    if torch.compiler.is_compiling():  # it traces no is_fake, and stands for a call with values
        return True
    return not (tensor.is_meta or is_fake(tensor))


def is_read(tensor: Tensor) -> bool:
    """Say whether reading a value of the tensor waits for nothing."""
    return tensor.device.type == "cpu" and has_values(tensor)
