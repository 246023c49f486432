"""Configuration dataclasses as YAML: written with each run, read back with every key checked."""

import math
import types
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists, strings and numbers, in the order of its fields."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def save_yaml(config: Any, path: Path) -> None:
    """Write the resolved configuration; `--config path` reads it back."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises: ValueError when the file is missing, is not YAML, or holds no mapping.
    """
    if not path.is_file():
        raise ValueError(f"--config must be a YAML file, got {path}: there is no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config must be a YAML file, got {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, got a {type(content).__name__}")
    return content


def update(config: T, values: dict[str, Any], key: str = "") -> T:
    """`config` with the nested `values` in place of its own.

    Args:
        config: a configuration dataclass.
        values: nested mapping, as read from YAML; it may name any part of the fields.
        key: dotted path of `config` inside the whole, for messages.
    Raises: ValueError for an unknown key, with the valid ones, or a value of the wrong type.
    """
    hints = _hints(config)
    changes = {}
    for name, value in values.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in hints:
            owner = f"{key} has" if key else "there are"
            raise ValueError(f"unknown key {path}; {owner} {', '.join(hints)}")
        current = getattr(config, name)
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{path} must hold keys and values, got {value!r}")
            changes[name] = update(current, value, path)
        else:
            changes[name] = _convert(value, hints[name], path)
    return replace(config, **changes)  # type: ignore[type-var]


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotated type; ValueError names the key, the type and the value."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        rest = [option for option in options if option is not type(None)]
        return _convert(value, rest[0], path)
    if origin is Literal:
        if value in options:
            return value
        raise ValueError(f"{path} must be one of {', '.join(map(str, options))}, got {value!r}")
    if origin is tuple:
        many = options[-1] is Ellipsis
        if isinstance(value, (list, tuple)) and (many or len(value) == len(options)):
            kinds = [options[0]] * len(value) if many else options
            return tuple(_convert(v, o, path) for v, o in zip(value, kinds, strict=True))
        size = "" if many else f" of {len(options)} values"
        raise ValueError(f"{path} must be a list{size}, got {value!r}")
    return _scalar(value, hint, path)


def _scalar(value: Any, hint: type, path: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-6 as text
        except ValueError:
            pass
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{path} must be of type {hint.__name__}, got {value!r}")


def _hints(config: Any) -> dict[str, Any]:
    """Field -> annotated type of a dataclass."""
    hints = get_type_hints(type(config))
    return {f.name: hints[f.name] for f in fields(config)}


def differences(old: dict[str, Any], new: dict[str, Any], key: str = "") -> dict[str, tuple]:
    """Dotted keys whose values differ, with (old, new); a key that one side lacks counts too."""
    out: dict[str, tuple] = {}
    for name in old | new:
        path = f"{key}.{name}" if key else name
        a, b = old.get(name, MISSING), new.get(name, MISSING)
        if isinstance(a, dict) and isinstance(b, dict):
            out |= differences(a, b, path)
        elif a != b:
            out[path] = tuple("absent" if v is MISSING else v for v in (a, b))
    return out


def positive(key: str, value: float) -> None:
    """Raises ValueError unless 0 < value < inf (nan is refused too)."""
    if not 0 < value < math.inf:
        raise ValueError(f"{key} must be positive and finite, got {value}")


def at_least(least: int, key: str, value: float | None) -> None:
    """Raises ValueError unless value is None or least <= value < inf (nan is refused too)."""
    if value is not None and not least <= value < math.inf:
        kind = "finite and " if isinstance(value, float) else ""
        raise ValueError(f"{key} must be {kind}at least {least}, got {value}")


def in_unit_interval(key: str, value: float) -> None:
    """Raises ValueError unless 0 <= value < 1 (nan is refused too)."""
    if not 0 <= value < 1:
        raise ValueError(f"{key} must be at least 0 and below 1, got {value}")
