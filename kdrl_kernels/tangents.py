"""Refuses forward-mode differentiation, whose derivatives would be 0 without a word."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from kdrl_kernels.adapter import LowRank

P = ParamSpec("P")
R = TypeVar("R")


def refuses_tangents(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function raise where a tensor carries a tangent, as under torch.func.jvp.

    An operator of torch.library passes on no tangent, so the derivative would read 0.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        values = [*args, *kwargs.values()]
        values += [x for value in values if isinstance(value, LowRank) for x in (value.A, value.B)]
        for value in values:
            if isinstance(value, Tensor) and unpack_dual(value).tangent is not None:
                raise NotImplementedError(
                    f"the inputs of {function.__name__} must not carry tangents of forward-mode "
                    "differentiation (torch.func.jvp, jacfwd): use backward()"
                )
        return function(*args, **kwargs)

    return wrapper
