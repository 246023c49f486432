"""What a settings class is: a frozen dataclass whose values pydantic checks, field by field.

The text under a field is its help on the command line. A field's type says its range:

    @settings
    class SamplingConfig:
        group_size: PositiveInt = 8
        '''G: completions per prompt.'''

Rules about several fields stand in `__post_init__`, as ValueError("field must be ..., got ..."),
with names relative to the class. A message about a nested value begins with its dotted key.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_origin

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, ValidationError
from pydantic_core import ErrorDetails, PydanticKnownError

from kdrl_train.other_names import key_of

T = TypeVar("T")


def _no_bool(value: Any) -> Any:
    """Refuses True and False, which pydantic reads as the numbers 1 and 0."""
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _no_number(value: Any) -> Any:
    """Refuses 1 and 0, which pydantic takes for True and False among the choices."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise PydanticKnownError("literal_error", {"expected": "False, True or 'auto'"})
    return value


Switch = StrictBool
SwitchOrAuto = Annotated[Literal[False, True, "auto"], BeforeValidator(_no_number)]
PositiveInt = Annotated[int, Field(strict=True, ge=1)]
Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
NaturalInt = Annotated[int, Field(strict=True, ge=0)]
_NO_BOOL = BeforeValidator(_no_bool)
Finite = Annotated[float, _NO_BOOL]
"""A number, also as text: YAML 1.1 reads 1e-6 as text. No type below takes inf and nan either."""
PositiveFloat = Annotated[float, Field(gt=0), _NO_BOOL]
LearningRate = Annotated[float, Field(gt=0, le=1e6), _NO_BOOL]
"""AdamW's: a weight moves by about as much in a step. From 3e37 on float32 overflows."""
NaturalFloat = Annotated[float, Field(ge=0), _NO_BOOL]
PositiveOrInf = Annotated[float, Field(gt=0, allow_inf_nan=True), _NO_BOOL]
"""Positive, and inf is allowed."""
NaturalOrInf = Annotated[float, Field(ge=0, allow_inf_nan=True), _NO_BOOL]
"""Not negative, and inf is allowed."""
UnitInterval = Annotated[float, Field(ge=0, lt=1), _NO_BOOL]
"""0 <= value < 1."""
Share = Annotated[float, Field(gt=0, le=1), _NO_BOOL]
"""0 < value <= 1."""
Probability = Annotated[float, Field(ge=0, le=1), _NO_BOOL]
OpenUnitInterval = Annotated[float, Field(gt=0, lt=1), _NO_BOOL]
"""0 < value < 1."""

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
_WORDS = {
    "missing": "must be given",
    "too_long": "must have no more values",
    "tuple_type": "must be a list",
    "dataclass_type": "must hold keys and values",
    "path_type": "must be a path",
    "float_parsing": "must be a number",
    "invalid_key": "must be a name",
}
"""What must be, where pydantic's own words are not those of a settings file."""


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,)
)
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass with keywords only, whose values are checked.

    A wrong value raises one ValueError, with a line for each: its dotted key, what it must be, and
    what was found.
    """
    checked: Any = pydantic.dataclasses.dataclass(
        cls, frozen=True, kw_only=True, slots=True, config=_CONFIG
    )
    check: Callable[..., None] = checked.__init__

    @wraps(check)
    def init(self: Any, /, **values: Any) -> None:
        try:
            check(self, **values)
        except ValidationError as error:
            lines = (_message(checked, line) for line in error.errors(include_url=False))
            raise ValueError("\n".join(lines)) from None

    checked.__init__ = init
    return checked


def is_settings(cls: Any) -> bool:
    """Whether a class is a settings class."""
    return hasattr(cls, "__pydantic_fields__")


def items(kind: Any) -> Any:
    """Return the settings class of which a field holds any number; None for any other field."""
    item, *rest = get_args(kind) if get_origin(kind) is tuple else (None,)
    item = get_args(item)[0] if get_origin(item) is Annotated else item
    return item if rest == [...] and is_settings(item) else None


def explanations(cls: Any) -> dict[str, str]:
    """Read the text under each field of a settings class, each as one line. A section that has no
    text is explained by its class's docstring."""
    texts: dict[str, str] = {}
    for base in filter(is_settings, reversed(cls.__mro__)):
        for name, info in base.__pydantic_fields__.items():
            section = info.annotation.__doc__ if is_settings(info.annotation) else ""
            text = info.description or texts.get(name) or section or ""  # none where inherited
            texts[name] = " ".join(text.split())
    return texts


def nearest(name: str, names: Iterable[str], others: Collection[str] = ()) -> str:
    """Write ' (did you mean ...?)' with the name that is spelt most like this one, or nothing.

    others: keys of other sections; one that ends in this name, or that TRL or verl call so, is
    meant rather than a name that is only somewhat like it.
    """
    alike = [get_close_matches(name, names, n=1, cutoff=cutoff) for cutoff in (0.8, 0.6)]
    meant = next(iter(alike[0]), None) or key_of(name, others) or next(iter(alike[1]), None)
    return f" (did you mean {meant}?)" if meant else ""


def keys_of(cls: Any, section: str = "") -> list[str]:
    """List the dotted keys of a settings class and of the sections in it."""
    keys = []
    for name, info in cls.__pydantic_fields__.items():
        keys.append(f"{section}{name}")
        if is_settings(info.annotation):
            keys += keys_of(info.annotation, f"{section}{name}.")
    return keys


def _message(cls: Any, error: ErrorDetails) -> str:
    """Write one of pydantic's errors as `key must be ..., got ...`."""
    key = ""
    for part in error["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    key = key.removeprefix(".")
    kind, text = error["type"], error["msg"]
    if kind == "value_error":
        return f"{key}.{error['ctx']['error']}".removeprefix(".")
    if error["loc"][-1] == "[key]":
        key = key.removesuffix(".[key]")
        return f"{key} must have names as keys, got {error['input']!r}"
    if kind == "unexpected_keyword_argument":
        *sections, name = error["loc"]
        others = keys_of(cls)
        for section in sections:
            cls = _inside(cls, section)
        names = list(cls.__pydantic_fields__)
        section, _, _ = key.rpartition(".")
        owner = f"{section} has" if section else "there are"
        hint = nearest(str(name), names, others)
        return f"unknown key {key}{hint}; {owner} {', '.join(names)}"
    must = _WORDS.get(kind) or text.replace("Input should be", "must be")
    must = must.replace("greater than or equal to", "at least")
    must = must.replace("less than or equal to", "at most")
    return f"{key} {must}, got {error['input']!r}"


def _inside(cls: Any, name: str | int) -> Any:
    """Return the class of one field of a settings class, or of one value of a mapping; of a union
    the part that is such a class, of a tuple that of its items."""
    if isinstance(name, int):  # a place in a tuple
        return cls
    kind = cls.__pydantic_fields__[name].annotation if is_settings(cls) else get_args(cls)[1]
    parts = (kind, *get_args(kind)) if get_origin(kind) is not dict else (kind,)
    return items(kind) or next((part for part in parts if is_settings(part)), kind)
