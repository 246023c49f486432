"""Flattens the dataclass of a call into what an operator of torch.library takes, and back."""

from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

T = TypeVar("T")
SCHEMA_TYPES = {Tensor: "Tensor", float: "float", bool: "bool", str: "str", Literal: "str"}
SCHEMA_TYPES |= {int: "SymInt", tuple: "bool[]"}  # a compiled caller may keep a size symbolic
FLOAT_OR_TENSOR = {float, Tensor}


class Layout(Generic[T]):
    """Lists the arguments of an operator that stand for the fields of a frozen dataclass.

    A nested dataclass gives the arguments of its fields, named parent_field; all of them are None
    where the field is. `float | Tensor` gives two arguments, one of which is None. The layout is
    made once, at import: torch.compile traces `flatten`, but reads no type hints.
    """

    def __init__(self, kind: type[T], prefix: str = "", optional: bool = False) -> None:
        self.kind, self.optional = kind, optional
        self.fields: dict[str, Any] = {}
        self.arguments: list[str] = []
        """The arguments as a schema writes them: type and name."""
        for name, hint in get_type_hints(kind).items():
            is_union = get_origin(hint) in (Union, UnionType)
            kinds = set(get_args(hint)) if is_union else {hint}
            mark, argument = "?" if optional or NoneType in kinds else "", prefix + name
            kinds -= {NoneType}
            if kinds == FLOAT_OR_TENSOR:
                self.fields[name] = FLOAT_OR_TENSOR
                self.arguments += [f"Tensor? {argument}", f"float? {argument}_number"]
                continue
            (field,) = kinds
            if isinstance(field, type) and is_dataclass(field):
                self.fields[name] = Layout(field, f"{argument}_", bool(mark))
                self.arguments += self.fields[name].arguments
            else:
                self.fields[name] = get_origin(field) or field
                self.arguments.append(f"{SCHEMA_TYPES[self.fields[name]]}{mark} {argument}")

    def schema(self, *outputs: str) -> str:
        """Return the schema of an operator with these arguments, whose outputs are tensors."""
        returns = ", ".join(f"Tensor {name}" for name in outputs)
        return f"({', '.join(self.arguments)}) -> ({returns})"

    def flatten(self, instance: T) -> list[Any]:
        """Return the value of each argument; all are None for None."""
        values: list[Any] = []
        for name, kind in self.fields.items():
            value: Any = None if instance is None else getattr(instance, name)
            is_number = value is not None and not isinstance(value, Tensor)
            if isinstance(kind, Layout):
                values += kind.flatten(value)
            elif kind is FLOAT_OR_TENSOR:
                values += [None, float(value)] if is_number else [value, None]
            else:
                values.append(float(value) if kind is float and is_number else value)
        return values

    def rebuild(self, values: Iterable[Any]) -> T:
        """Return the dataclass that `flatten` turned into these values, taken off the front."""
        values, arguments = iter(values), dict[str, Any]()
        for name, kind in self.fields.items():
            value = kind.rebuild(values) if isinstance(kind, Layout) else next(values)
            if kind is FLOAT_OR_TENSOR:
                number = next(values)
                value = number if value is None else value
            arguments[name] = tuple(value) if kind is tuple else value
        if self.optional and all(value is None for value in arguments.values()):
            return None  # type: ignore[return-value] # only a nested one
        return self.kind(**arguments)

    def head_gradients(self, gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Return gradients of the first arguments, hidden, weight and bias, and None for others."""
        first = tuple(gradients)
        return *first, *[None] * (len(self.arguments) - len(first))


def no_vmap(info: Any, in_dims: Any, *values: Any) -> Any:
    """Refuse torch.vmap, under which no tensor says that it needs a gradient: none would come."""
    raise NotImplementedError(
        "linear_logprobs and kdrl_loss must not run under torch.vmap, where they would give no "
        "gradient: pass a batch as hidden [B, T, H], or use impl='reference'"
    )


def no_none(tensors: Iterable[Tensor | None], like: Tensor) -> list[Tensor]:
    """Put an empty tensor in the place of None, which an operator cannot return."""
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def fake(like: Tensor, dtype: torch.dtype, sizes: Iterable[Sequence[int] | None]) -> list[Tensor]:
    """Return tensors of these sizes on the device of another one, empty ones for None."""
    return [like.new_empty((0,) if size is None else size, dtype=dtype) for size in sizes]
