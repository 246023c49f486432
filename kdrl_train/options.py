"""Reads options from a command line by tyro, and explains them."""

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from rich.table import Table
from rich.text import Text
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from kdrl_train.config_file import read_mapping, to_dict, write_mapping
from kdrl_train.other_names import key_of
from kdrl_train.output import guarded_console
from kdrl_train.settings import explanations, is_settings, items, keys_of

MAPPING: Any = Annotated[
    Any,
    PrimitiveConstructorSpec(
        nargs="*",  # a shell splits a mapping without quotes at its spaces
        metavar="YAML",
        instance_from_str=lambda words: read_mapping(" ".join(words)),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [write_mapping(value)],
    ),
]
"""An option whose value is a mapping in YAML; it takes the place of the whole mapping."""
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")
"""What people write behind a switch, in small letters."""


def read_options(
    default: Any,
    argv: list[str],
    extra: Sequence[StructFieldSpec],
    program: str,
    description: str,
    *,
    short: bool,
) -> dict[str, Any]:
    """Read options over `default` by tyro; return all values by their keys.

    short: --help explains a part of the options, so errors name --help-all.
    """
    kind: Any = type(default)  # read as a dict
    try:
        values: dict[str, Any] = tyro.cli(
            kind,
            default=default,
            args=argv,
            prog=program,
            description=description,
            add_help="--help" in argv or not short,
            registry=_registry(default, extra),
        )
    except SystemExit as end:
        if end.code:
            sys.stderr.writelines(_meant(argv, default))
        if end.code and short:
            sys.stderr.write(f"{program} --help-all explains all options.\n")
        raise
    return values


def _meant(argv: Sequence[str], default: Any) -> Iterator[str]:
    """Write a line for each option that is another's name, a switch with a value, or a section."""
    keys = keys_of(type(default))
    for word, following in pairwise([*argv, ""]):
        option = word.partition("=")[0]
        key = option.removeprefix("--").replace("-", "_")
        if not re.fullmatch(r"--[\w.-]+", option):
            continue
        if key not in keys:
            meant = key_of(key.rpartition(".")[2], keys)
        else:
            section, _, name = key.rpartition(".")
            owner = type(attrgetter(section)(default) if section else default)
            kind = owner.__pydantic_fields__[name].annotation
            if kind is bool and (option != word or following.lower() in BOOLEANS):
                off = f"--{section}{'.' if section else ''}no-{name}".replace("_", "-")
                yield f"{option} takes no value: write {option} for true, {off} for false\n"
            meant = f"{key}.initial" if f"{key}.initial" in keys else None
        if meant:
            yield f"{option}: did you mean --{meant.replace('_', '-')}?\n"


def _registry(root: Any, extra: Sequence[StructFieldSpec]) -> ConstructorRegistry:
    """Make tyro read each settings class as a dict, and the extra options beside those of `root`.

    The values are checked all at once afterwards, by `update`: only there is a key's whole name
    known.
    """
    registry = ConstructorRegistry()

    @registry.struct_rule
    def _(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not is_settings(info.type):
            return None
        specs = field_specs(info.default)
        return StructConstructorSpec(dict, (*extra, *specs) if info.default is root else specs)

    return registry


def field_specs(config: Any) -> tuple[StructFieldSpec, ...]:
    """Describe the fields of a settings object for tyro: name, type, value as default, help."""
    types, texts = get_type_hints(type(config), include_extras=True), explanations(type(config))
    specs = []
    for name, text in texts.items():
        kind, value = types[name], getattr(config, name)
        if get_origin(kind) is dict:
            kind = MAPPING
        elif items(kind) is not None:  # a word each
            kind = tuple[str, ...]
            value = tuple(write_mapping(to_dict(one)) for one in value)
        specs.append(StructFieldSpec(name, kind, value, text))
    return tuple(specs)


def print_help(
    config: Any,
    extra: Sequence[StructFieldSpec],
    program: str,
    description: str,
    options: Sequence[str],
) -> None:
    """Print the main options of a command: name, first sentence of the help, default.

    Args:
        config: the settings, with their defaults.
        extra: options besides the settings.
        description: what the command does, and where its settings come from.
        program, options: as cli.parse takes them.
    """
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for key in options:
        section, _, name = key.rpartition(".")
        specs = field_specs(attrgetter(section)(config) if section else config)
        spec = next(spec for spec in (*extra, *specs) if spec.name == name)
        sentence = str(spec.helptext).split(". ")[0].removesuffix(".")
        table.add_row(f"  --{key.replace('_', '-')}", Text(sentence + _default(spec)))
    console = guarded_console()
    what, _, epilog = description.partition("\n\n")
    console.print(f"usage: {program} [options]\n\n{what}\n")
    console.print(table)
    console.print(f"\n{epilog}\n\n{program} --help-all explains all options.")


def _default(spec: StructFieldSpec) -> str:
    """Write an option's default for a person, and its choices where they are few."""
    if isinstance(spec.default, tuple):
        return f" ({' '.join(map(str, spec.default))})" if spec.default else ""
    default = "" if spec.default is None or spec.default is False else str(spec.default)
    kinds = (spec.type, *get_args(spec.type))  # a choice, or a choice or None
    choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    others = ", ".join(str(choice) for choice in choices if choice != spec.default)
    words = "; or ".join(filter(None, (default, others)))
    return f" ({words})" if words else ""
