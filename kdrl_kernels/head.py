"""Defines an LM head: final hidden states and the matrix that turns them into logits."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from kdrl_kernels.plain import check_number, kind_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLOATS16 = (torch.float16, torch.bfloat16)
Needs = tuple[bool, bool, bool]
"""Whether hidden, weight and bias need a gradient."""
Sums = tuple[Tensor | None, Tensor | None, Tensor | None]
"""dX, dW and db; None where not needed."""


@dataclass(frozen=True, slots=True)
class Head:
    """Holds a head: z = softcap(hidden · weightᵀ + bias) / temperature.

    softcap(a) = cap · tanh(a / cap).

    Args:
        hidden: [N, H], float32, float16, bfloat16 or float64: final hidden states.
        weight: [V, H], on the device of hidden, in its dtype; or one of the two in float32 and the
            other in 16 bits. The arithmetic is that of hidden's dtype (in_one_dtype).
        bias: [V], the same dtypes and device, or None. -inf forbids a token, unless a softcap makes
            it finite.
        temperature: positive float, or [N] tensor with one per row.
        softcap: positive float (final_logit_softcapping of Gemma), or None.
    Raises: ValueError for a shape, device or scalar; TypeError for a type or dtype.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        check_head(self, prefix="")

    @property
    def trained_columns(self) -> int:
        """How many columns of weight may have a gradient: the last ones."""
        return self.weight.shape[1]

    @property
    def trained_hidden(self) -> Tensor:
        """The columns of hidden that meet them, a view."""
        return self.hidden[:, self.hidden.shape[1] - self.trained_columns :]

    def select(self, rows: slice | Tensor) -> Self:
        """Return this head on some rows: a slice, or int64 indices."""
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature[rows]
        return replace(self, hidden=self.hidden[rows], temperature=temperature)


@dataclass(frozen=True, slots=True)
class TeacherHead(Head):
    """Holds the teacher's final hidden states and head, for its log-probabilities or the exact KL.

    Fields and errors are those of Head: hidden [N, H_t] ([B, T, H_t] beside a student's [B, T, H]),
    weight [V_t, H_t], bias [V_t] or None, temperature, softcap. H_t and V_t may differ from the
    student's. It is never trained: gradients stop here.
    """

    def __post_init__(self) -> None:
        check_head(self, prefix="teacher.")
        for name in ("hidden", "weight", "bias"):
            tensor = getattr(self, name)
            if tensor is not None:
                object.__setattr__(self, name, tensor.detach())


@dataclass(frozen=True, slots=True)
class StudentHead(Head):
    """Holds the head that is trained, whose weight may stand beside a constant one.

    Fields are those of Head, and two that adapter.py sets, after its checks.
    """

    constant: Tensor | None = None
    """[V, H - r], the weight of the first columns of hidden; `weight` is then [V, r]."""
    rank: int | None = None
    """r where `weight` is [V, H], of which the last r columns are trained; None: all are."""

    def __post_init__(self) -> None:
        if self.constant is None:
            check_head(self, prefix="")

    @property
    def trained_columns(self) -> int:
        """How many columns of weight may have a gradient: the last ones."""
        return self.weight.shape[1] if self.rank is None else self.rank


AnyHead = TypeVar("AnyHead", bound=Head)
OPERAND_COLUMNS = 8
"""What stands beside a weight is padded to a multiple: 16-byte rows, as fast 16-bit GEMMs want."""


def spare_columns(columns: int) -> int:
    """Return how many columns of zeros pad those of an adapter, or of a composite's biases."""
    return -columns % OPERAND_COLUMNS


def in_one_dtype(head: AnyHead) -> AnyHead:
    """Return a head with one weight, and a bias, in the dtype of hidden: no copy if they are so.

    So a float32 master weight meets 16-bit hidden states as under autocast, but the pass adds its
    gradient in float32, and never rounds it to 16 bits. Where one weight stands beside another,
    the copy holds both.
    """
    dtype, bias, weight = head.hidden.dtype, head.bias, head.weight
    bias = bias if bias is None else bias.to(dtype)
    if not isinstance(head, StudentHead) or head.constant is None:
        return replace(head, weight=weight.to(dtype), bias=bias)
    (V, r), first = weight.shape, head.constant.shape[1]
    both = weight.new_empty(V, first + r, dtype=dtype)
    both[:, :first], both[:, first:] = head.constant, weight
    return replace(head, weight=both, bias=bias, constant=None, rank=r)


def gradient_dtypes(head: Head) -> list[torch.dtype]:
    """Return the dtypes of the gradients of hidden, weight and bias: those of the tensors."""
    hidden, bias = head.hidden, head.bias
    return [hidden.dtype, head.weight.dtype, hidden.dtype if bias is None else bias.dtype]


def needs_gradient(head: Head) -> Needs:
    """Say which of hidden, weight and bias need a gradient, in the grad mode of the caller."""
    hidden, weight, bias = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (head.hidden, head.weight, head.bias)
    )
    return hidden, weight, bias


def gradient_sizes(head: Head, needs: Needs) -> list[torch.Size | None]:
    """Return the size of each gradient of hidden, weight and bias; None where none is needed."""
    pairs = zip((head.hidden, head.weight, head.bias), needs, strict=True)
    return [x.shape if need and x is not None else None for x, need in pairs]


class _Gather(torch.autograd.Function):
    """Gathers shards to a plain tensor; its gradient is the mean over the ranks, as shards."""

    @staticmethod
    def forward(ctx: Any, shards: DTensor, dtype: torch.dtype) -> Tensor:
        ctx.mesh, ctx.placements, ctx.dtype = shards.device_mesh, shards.placements, shards.dtype
        ctx.stride = shards.stride()
        cast: Any = shards.to(dtype)  # Any: torch declares that a DTensor becomes a Tensor
        return cast.full_tensor()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[DTensor, None]:
        # 16-bit gradients are added in float32: a sum over many ranks would lose its last ranks
        gradient = gradient.to(torch.promote_types(ctx.dtype, torch.float32))
        each = [Partial()] * ctx.mesh.ndim
        shape = gradient.shape
        partial = DTensor.from_local(gradient, ctx.mesh, each, shape=shape, stride=ctx.stride)
        mean = partial.redistribute(placements=ctx.placements) / ctx.mesh.size()
        return mean.to(ctx.dtype), None


@overload
def gathered(tensor: Tensor, hidden: Tensor) -> Tensor: ...
@overload
def gathered(tensor: None, hidden: Tensor) -> None: ...
def gathered(tensor: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Gather a DTensor to a plain tensor of full size, whose gradient is the mean over the ranks.

    FSDP2, FSDP1 and DDP average every other gradient over the ranks, so one normalizer, the global
    token count divided by the ranks, is right for the head and for the body, wherever the head is
    gathered. The mean is also right along a dimension of tensor parallelism, whose ranks have the
    same rows and thus the same gradient.

    Args:
        hidden: the hidden states. Where they have 16 bits, float32 shards become their dtype, as
            under FSDP2's MixedPrecisionPolicy; the gradient is averaged in float32.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return _Gather.apply(tensor, _computed_dtype(tensor, hidden))


def _computed_dtype(tensor: Tensor, hidden: Tensor) -> torch.dtype:
    """Return the dtype in which a head's tensor meets the hidden states."""
    half = getattr(hidden, "dtype", None) in FLOATS16
    mixed = isinstance(tensor, DTensor) and tensor.dtype == torch.float32 and half
    return hidden.dtype if mixed else tensor.dtype


def check_head(head: Head, prefix: str) -> None:
    """Raise an error that names the field, what it must be and what it is, unless head is valid."""
    hidden, weight, bias = head.hidden, head.weight, head.bias
    if isinstance(hidden, DTensor):
        raise TypeError(f"{prefix}hidden must be a plain tensor, this rank's rows, got a DTensor")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{prefix}{name} must be a tensor, got {kind_of(tensor)}")
        if tensor.dtype not in FLOATS:
            kinds = "float32, float16, bfloat16 or float64"
            raise TypeError(f"{prefix}{name} must be {kinds}, got {tensor.dtype}")
    _check_shapes(hidden, weight, prefix)
    check_like(f"{prefix}weight", weight, f"{prefix}hidden", hidden)
    _check_whole(f"{prefix}weight", weight)
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"{prefix}bias must be a tensor or None, got {type(bias).__name__}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{prefix}bias must be [V] with V = {weight.shape[0]}, got {list(bias.shape)}"
            )
        check_like(f"{prefix}bias", bias, f"{prefix}hidden", hidden)
    _check_temperature(head.temperature, hidden, f"{prefix}temperature")
    check_number(f"{prefix}softcap", head.softcap, optional=True)
    if head.softcap is not None and not 0 < head.softcap < math.inf:
        raise ValueError(f"{prefix}softcap must be positive and finite or None, got {head.softcap}")


def _check_shapes(hidden: Tensor, weight: Tensor, prefix: str) -> None:
    if hidden.ndim not in (2, 3):
        raise ValueError(f"{prefix}hidden must be [N, H] or [B, T, H], got {list(hidden.shape)}")
    if weight.ndim != 2:
        shard = weight.ndim == 1 and dist.is_initialized()
        hint = ": of a shard of FSDP1, call this inside its module's forward" if shard else ""
        raise ValueError(f"{prefix}weight must be [V, H], got {list(weight.shape)}{hint}")
    if weight.shape[1] != hidden.shape[-1]:
        hint = ""
        if weight.shape[0] == hidden.shape[-1]:  # V is larger than H in most models
            logits = f": transpose it, or pass states as {prefix}hidden, if it holds logits"
            hint = ": transpose it" if weight.shape[0] < weight.shape[1] else logits
        raise ValueError(
            f"{prefix}weight must be [V, H] with H = {hidden.shape[-1]}, got "
            f"{list(weight.shape)}{hint}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{prefix}weight must have at least one row, got {list(weight.shape)}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless tensor is on the device of other, in its dtype or one of the mixed pairs."""
    dtypes = {tensor.dtype, other.dtype}
    if len(dtypes) > 1 and (torch.float32 not in dtypes or not dtypes & set(FLOATS16)):
        raise TypeError(
            f"{name} must have the dtype of {other_name} ({other.dtype}), or one of the two must "
            f"be float32 and the other float16 or bfloat16, got {tensor.dtype}"
        )
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless tensor is on the device of other."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}"
        )


def _check_whole(name: str, tensor: Tensor) -> None:
    """Raise where FSDP has freed the memory of a weight that it keeps in shards."""
    if torch.compiler.is_compiling() or isinstance(tensor, DTensor) or not dist.is_initialized():
        return
    if tensor.untyped_storage().nbytes() == 0:
        raise ValueError(
            f"{name} must be in memory, got one that FSDP has freed: call this inside the forward "
            "of the module that holds it, or with FSDP2 read the module's parameter there and then"
        )


def _check_temperature(temperature: float | Tensor, hidden: Tensor, name: str) -> None:
    if not isinstance(temperature, Tensor):
        check_number(name, temperature)
        if not temperature > 0:
            raise ValueError(f"{name} must be positive, got {temperature}")
        return
    if temperature.shape != hidden.shape[:-1]:
        sizes = "[N] with N = {}" if hidden.ndim == 2 else "[B, T] with B = {} and T = {}"
        raise ValueError(
            f"{name} must be a float or {sizes.format(*hidden.shape)}, "
            f"got {list(temperature.shape)}"
        )
    if not temperature.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {temperature.dtype}")
    check_device(name, temperature, "hidden", hidden)
