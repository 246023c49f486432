"""Refuses transforms of torch.func: derivatives would be 0, or an error of PyTorch's long."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from kdrl_kernels.adapter import LowRank

P = ParamSpec("P")
R = TypeVar("R")


def refuses_tangents(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function raise where a tensor carries a tangent, as under torch.func.jvp, and, but for
    the definition, where it is one of torch.func.grad.

    An operator of torch.library passes on no tangent, so the derivative would read 0; of the other
    transforms PyTorch says in four lines what the operator lacks.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        values = [*args, *kwargs.values()]
        values += [x for value in values if isinstance(value, LowRank) for x in (value.A, value.B)]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise NotImplementedError(
                f"the inputs of {function.__name__} must not carry tangents of forward-mode "
                "differentiation (torch.func.jvp, jacfwd): use backward()"
            )
        is_operator = kwargs.get("impl") != "reference" and not torch.compiler.is_compiling()
        if is_operator and any(_is_tracked(tensor) for tensor in tensors):
            raise NotImplementedError(
                f"{function.__name__} must not run under torch.func.grad, vjp or jacrev: use "
                "backward() or torch.autograd.grad, or impl='reference'"
            )
        return function(*args, **kwargs)

    return wrapper


def _is_tracked(tensor: Tensor) -> bool:
    """Say whether torch.func.grad, or a transform like it, wants the gradient of a tensor."""
    return tensor.requires_grad and torch._C._functorch.is_gradtrackingtensor(tensor)
