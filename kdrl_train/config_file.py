"""Settings as YAML: written with each run, and read back with every key and value checked."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kdrl_train.errors import written

T = TypeVar("T")
MOST_BYTES = 1_000_000
"""Longest YAML file of settings that is read; that of a run has some kilobytes."""

RECIPES = Path(__file__).with_name("recipes")
RECIPE = "recipe:"
"""What stands before the name of one of RECIPES, as a file of settings."""

BUILT_IN = dict.fromkeys(("reward.function", "reward.functions"), "math, exact, or ")
"""What a setting that names a function may be besides module:function."""


class _Loader(yaml.SafeLoader):
    """Reads YAML without what settings need not have: references, by which a short file can stand
    for gigabytes, and a key that stands twice, of which the last would win."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()
            raise yaml.composer.ComposerError(
                None,
                None,
                f"*{event.anchor} refers to another value: write it out",
                event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in names:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name} stands twice", key.start_mark
                )
            names.add(name)
        return super().construct_mapping(node, deep)


def to_dict(config: Any) -> dict[str, Any]:
    """Turn settings into plain dicts, lists, strings and numbers, in the order of their fields."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def read_mapping(text: str) -> dict[Any, Any]:
    """Read a mapping in YAML, the value of an option. Raises: ValueError for any other text."""
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"it must hold keys and values, as in '{{name: value}}', got {text!r}")
    return content


def write_mapping(values: dict[Any, Any]) -> str:
    """Write a mapping as one line of YAML, which read_mapping reads."""
    text = yaml.safe_dump(_plain(values), default_flow_style=True, width=10**6, sort_keys=False)
    return text.strip()


def save_yaml(config: Any, path: Path) -> None:
    """Write the resolved configuration; `--config path` reads it back."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    work = path.with_name(f".{path.name}.tmp")  # a killed process leaves the old file or the new
    with written(path):
        work.unlink(missing_ok=True)  # a link would be followed
        work.write_text(text, encoding="utf-8")
        work.replace(path)


def settings_file(name: str) -> Path:
    """Return the path of a file of settings: a person's own, or one of RECIPES, as recipe:paper.

    Raises: ValueError for a recipe that there is none of.
    """
    if not name.startswith(RECIPE):
        return Path(name)
    paths = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    recipe = name.removeprefix(RECIPE)
    if recipe not in paths:
        raise ValueError(
            f"--config must name a file, or {RECIPE} and one of {', '.join(paths)}, got {name}; "
            f"these are files in {RECIPES}"
        )
    return paths[recipe]


def load_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises: ValueError when the file is missing, is not YAML, or holds no mapping.
    """
    if not path.is_file():
        why = "it is a folder" if path.is_dir() else "there is no such file"
        why = "it is a pipe or a device" if path.exists() and not path.is_dir() else why
        raise ValueError(f"--config must be a YAML file, got {path}: {why}")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    # a ValueError: no UTF-8, no date, a number of 5,000 digits; a RecursionError: deep brackets
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())  # YAML's errors have several lines
        raise ValueError(f"--config must be a YAML file, got {path}: {why}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, got a {type(content).__name__}")
    return content


def require_own_module(function: str, path: Path, key: str = "reward.function") -> None:
    """Check that a file of settings names a function of the user's own files, or a built-in one.

    Whoever writes the file chooses which module is imported. It must not be any installed one.

    key: the setting that names it.
    Raises: ValueError for `module:function` where the module is in an installed package.
    """
    top = function.partition(":")[0].partition(".")[0]
    if ":" not in function or top in ("", "kdrl_train"):
        return
    spec = importlib.util.find_spec(top)
    files = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    places = {"site-packages", "dist-packages"}
    installed = any(places & set(Path(file).parts) for file in files if file)
    if installed or top in sys.stdlib_module_names:
        raise ValueError(
            f"{key} in {path} must be {BUILT_IN.get(key, '')}a function in a file of your own, "
            f"got {function}, of an installed package: if you trust that file, pass "
            f"--{key} {function}"
        )


def update(config: T, values: Mapping[str, Any]) -> T:
    """Replace some values of a configuration, and check the whole.

    Args:
        config: the settings to change; they stay as they are.
        values: nested mapping, as read from YAML; it may name any part of the fields.
    Raises: ValueError for an unknown key or a wrong value; the message begins with the dotted key.
    """
    return type(config)(**_merge(config, values))


def require_read(before: Any, after: Any, unread: Callable[[Any], Mapping[str, str]]) -> None:
    """Raise ValueError where options have set what nothing reads.

    Args:
        before: the settings without options.
        after: with them.
        unread: returns why nothing reads some of the settings, by key; a section stands for all of
            its own. Called where options have set something.
    """
    typed = differences(to_dict(before), to_dict(after))
    lines, reasons = [], unread(after) if typed else {}
    for key, (_, now) in typed.items():
        option = _option(after, key)
        value = now if option == key else f"{key} = {now}"
        for one, reason in reasons.items():
            whole = f"{key}.".startswith(f"{one}.")
            if whole or f"{one}.".startswith(f"{key}."):
                must = "be left out" if whole else f"leave out {one}"
                flag = f"--{option.replace('_', '-')}"
                lines.append(f"{flag} must {must}, got {value}: {reason}")
                break
    if lines:
        raise ValueError("\n".join(lines))


def _option(config: Any, key: str) -> str:
    """Return the key of the option that sets a key: a mapping is set as a whole."""
    names = key.split(".")
    for depth, name in enumerate(names, start=1):
        if not is_dataclass(config := getattr(config, name)):
            return ".".join(names[:depth])
    return key


def _merge(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Put `values` in place of the fields of `config` that they name, section by section."""
    merged = {f.name: getattr(config, f.name) for f in fields(config)}
    for key, value in values.items():
        name = str(key)  # YAML's keys may be numbers, which name no field
        section = merged.get(name)
        nested = is_dataclass(section) and isinstance(value, dict)
        merged[name] = _merge(section, value) if nested else value
    return merged


def differences(old: dict[str, Any], new: dict[str, Any], key: str = "") -> dict[str, tuple]:
    """Find the dotted keys whose values differ, with (old, new); a key that one side lacks has the
    value "absent" there."""
    out: dict[str, tuple] = {}
    for name in old | new:
        path = f"{key}.{name}" if key else name
        a, b = old.get(name, MISSING), new.get(name, MISSING)
        if isinstance(a, dict) and isinstance(b, dict):
            out |= differences(a, b, path)
        elif a != b:
            out[path] = tuple("absent" if v is MISSING else v for v in (a, b))
    return out
