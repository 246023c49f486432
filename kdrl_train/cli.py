"""Command line: `python -m kdrl_train <command>`. Defaults < preset < YAML file < options."""

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.constructors import StructFieldSpec

from kdrl_train.commands import COMMANDS
from kdrl_train.config import TrainConfig
from kdrl_train.config_file import (
    load_yaml,
    require_own_module,
    require_read,
    settings_file,
    to_dict,
    update,
)
from kdrl_train.errors import PRINTED, needs_extra
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.options import print_help, read_options
from kdrl_train.output import begin, fill_descriptors, guarded, guarded_console, shown
from kdrl_train.settings import nearest

T = TypeVar("T")
PROGRAM = "python -m kdrl_train"
PACKAGES = "loading Python packages"  # torch and transformers take seconds


EPILOG = (
    "Settings come from the defaults, then --preset (if the command has it), then the YAML file "
    "given with --config, then the options. Later ones replace earlier ones."
)
EPILOG_OF_RUNS = f"{EPILOG} --config also takes the config.yaml of a run."

FUNCTIONS = ("reward.function", "method.loss")
"""Settings that name a function, whose module is imported."""
_FILE: Any = Path | None  # Any: a StructFieldSpec is declared to take a class
_METHOD: Any = Literal[tuple(PRESETS)] | None
CONFIG = StructFieldSpec(
    "config", _FILE, None, "YAML file with any of these settings. An unknown key is an error."
)
CONFIG_OR_RUN = StructFieldSpec(
    "config",
    _FILE,
    None,
    "YAML file with any of these settings. Or recipe:NAME, for one of kdrl_train/recipes. An "
    "unknown key is an error.",
)
"""The same of a command that takes the settings of a run, of which a recipe has some."""
PRESET = StructFieldSpec(
    "preset", _METHOD, None, "Method to start from. Options under --method change parts of it."
)


def parse(
    default: T,
    argv: Sequence[str],
    program: str,
    description: str,
    options: tuple[str, ...] = (),
    of_run: Callable[[TrainConfig, Path], T] | None = None,
    unread: Callable[[T], Mapping[str, str]] = lambda _: {},
) -> T:
    """Read a command's settings from its arguments.

    Args:
        default: settings with their defaults; a field `method` makes the command take --preset.
        argv: arguments after the command's name.
        program: what starts the command, for the usage line.
        description: what the command does.
        options: dotted keys that --help explains, one line each; --help-all explains all. Empty:
            --help explains all.
        of_run: makes the command's settings from those of a run and its folder, if --config names
            the config.yaml of a run; None: the command takes no run's settings but a run's own.
        unread: says of settings which of their keys nothing reads, and why. A file may hold them;
            an option must not.
    Raises: ValueError for an unknown key or preset, a wrong value, an option that is not read, or a
        YAML file that leaves nothing to --preset; SystemExit after help (0) and for an unknown or
        unreadable option (2).
    """
    early = early_options(argv)
    path = None if early.config is None else settings_file(early.config)
    takes_runs = of_run is not None or isinstance(default, TrainConfig)
    extra = [CONFIG_OR_RUN if takes_runs else CONFIG]
    if hasattr(default, "method"):
        extra.append(PRESET)
    default = with_file(default, early, path, of_run)
    about = f"{description}\n\n{EPILOG_OF_RUNS if takes_runs else EPILOG}"
    if options and not early.help_all and {"-h", "--help"} & set(argv):
        print_help(default, extra, program, about, options)
        sys.exit(0)
    argv = ["--help"] if early.help_all else list(switched(argv))
    values = read_options(default, argv, extra, program, about, short=bool(options))
    settings = update(default, {name: values[name] for name in to_dict(default)})
    require_read(default, settings, unread)
    if path is not None:
        require_own_modules(settings, path, vars(early))
    return settings


def early_options(argv: Sequence[str]) -> argparse.Namespace:
    """Read the options that decide how the others are read, and which functions were typed."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?")  # without a value: tyro's message, further down
    first.add_argument("--preset", nargs="?")
    first.add_argument("--help-all", action="store_true")
    for key in FUNCTIONS:
        first.add_argument(f"--{key}", nargs="?")
    first.add_argument("--reward.functions", nargs="*")
    early, _ = first.parse_known_args(list(argv))
    return early


def with_file(
    default: T,
    early: argparse.Namespace,
    path: Path | None,
    of_run: Callable[[TrainConfig, Path], T] | None,
) -> T:
    """Return the settings before the options: the defaults, then the preset, then the file.

    Args:
        default, of_run: as `parse` takes them.
        early: of early_options.
        path: the file of --config; None: there is none.
    """
    file = {} if path is None else load_yaml(path)
    if early.preset not in ("None", None) and hasattr(default, "method"):
        require_preset(early.preset)
        default = replace(default, method=PRESETS[early.preset])  # type: ignore[type-var]
        require_room(early.preset, file, early.config)
    if of_run is None or path is None or not is_training(file, default):
        return update(default, file)
    training = update(TrainConfig(), file)
    # such a file comes with its model: whether the model's code is run says this command
    model = replace(training.model, trust_remote_code=False)
    return of_run(replace(training, model=model), path.parent)


def require_own_modules(settings: Any, path: Path, typed: Mapping[str, Any]) -> None:
    """Raise ValueError where a file of settings names a function of an installed package.

    typed: options of the command line by their keys; what a person typed may be any function.
    """
    for key in FUNCTIONS:
        section, _, name = key.partition(".")
        function = getattr(getattr(settings, section, None), name, None)
        if function is not None and typed[key] != function:
            require_own_module(function, path, key)
    reward = getattr(settings, "reward", None)
    for part in () if reward is None or typed["reward.functions"] else reward.functions:
        if part.function != typed["reward.function"]:
            require_own_module(part.function, path, "reward.functions")


def require_preset(name: str) -> None:
    """Raise ValueError for a name of no preset; tyro's message has the names in any order."""
    if name not in PRESETS:
        raise ValueError(
            f"--preset must be one of {', '.join(PRESETS)}, got {name}{nearest(name, PRESETS)}"
        )


def require_room(preset: str, file: Mapping[str, Any], name: str) -> None:
    """Raise ValueError for a file called `name` that sets every key of the method."""
    if {f.name for f in fields(MethodConfig)} <= set(file.get("method") or {}):
        raise ValueError(
            f"--preset must leave something to set, got {preset} and {name}, which sets every key "
            "of method, as the config.yaml of a run does: drop --preset to keep that method, or "
            "remove the section method from a copy of the file to replace it"
        )


def switched(argv: Sequence[str]) -> Iterator[str]:
    """Write --resume, which needs no value, and --no-resume with the value that tyro reads."""
    for word, following in pairwise([*argv, ""]):
        if word == "--no-resume":
            yield from ("--resume", "False")
        else:
            yield word
            if word == "--resume" and following not in ("True", "False", "auto"):
                yield "True"


def is_training(file: Mapping[str, Any], default: Any) -> bool:
    """Say whether a file holds settings of `train` that are no settings of a command."""
    keys, training = ({f.name for f in fields(one)} for one in (default, TrainConfig))
    return bool(set(file) & (training - keys)) and not set(file) & (keys - training)


def run(command: str, argv: Sequence[str]) -> int:
    """Run one command; returns its exit code. Each imports only what it needs."""
    spec = COMMANDS[command]
    if not spec.settings.startswith("config."):  # settings beside code that imports torch
        begin(PACKAGES)
    module, _, name = f"kdrl_train.{spec.settings}".rpartition(".")
    with needs_extra(spec.extra):
        default = getattr(importlib.import_module(module), name)()

    def of_run(settings: TrainConfig, folder: Path) -> Any:
        begin(PACKAGES, at_once=spec.lasts)
        return importlib.import_module(f"kdrl_train.{spec.module}").of_run(settings, folder)

    def unread(settings: Any) -> dict[str, str]:
        reasons = dict.fromkeys(spec.unread, "this command does not read it")
        if spec.rules:
            begin(PACKAGES, at_once=spec.lasts)
            module, _, name = f"kdrl_train.{spec.rules}".rpartition(".")
            with needs_extra(spec.extra):
                rules = getattr(importlib.import_module(module), name)
            reasons |= {key: f"nothing reads it, as {why}" for key, why in rules(settings).items()}
        return reasons

    config = parse(
        default,
        argv,
        f"{PROGRAM} {command}",
        spec.help,
        spec.options,
        of_run if spec.of_run else None,
        unread,
    )
    begin(PACKAGES, at_once=spec.lasts)
    with needs_extra(spec.extra):
        main_module = importlib.import_module(f"kdrl_train.{spec.module}")
        importlib.import_module("transformers").logging.disable_progress_bar()  # one bar a file
    begin("working")  # until the command says more
    result = main_module.main(config)
    return result if command in ("check", "plan") else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 refused with a message, 2 wrong usage.

    A command whose output nobody can read any more, as in `plan | head`, goes on without it.
    """
    fill_descriptors()
    with guarded():
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        except Exception:  # an error of ours; Python itself would print its text without escaping
            traceback.print_exc()
            return 1


def _main(argv: list[str]) -> int:
    """Run the command that the arguments name, as `main` says."""
    console = guarded_console(stderr=True)
    if not argv or argv[0] in ("-h", "--help"):
        print_usage(guarded_console())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print_error(
            console,
            f"command must be one of {', '.join(COMMANDS)}, got {argv[0]}"
            f"{nearest(argv[0], COMMANDS)}",
        )
        return 2
    is_help = {"-h", "--help", "--help-all"} & set(argv)
    with nullcontext() if is_help else shown(argv[0]):
        return exit_code(lambda: run(argv[0], argv[1:]), console)


def exit_code(command: Callable[[], int], console: Console) -> int:
    """Run a command; returns its exit code, or 1 after the message of an error that it raised."""
    try:
        return command()
    except PRINTED as error:
        print_error(console, "\n".join([str(error), *getattr(error, "__notes__", ())]))
        return 1


def print_error(console: Console, message: str) -> None:
    """Print a message behind the word error."""
    console.print(Text.assemble(("error", "bold red"), ": ", message), soft_wrap=True)


def print_usage(console: Console) -> None:
    """Print the list of commands."""
    table = Table.grid(padding=(0, 1, 0, 0))
    for name, command in COMMANDS.items():
        table.add_row(Text(f"  {name}", "bold"), command.help)
    console.print("usage: python -m kdrl_train <command> [options]", markup=False)
    console.print("", table, "", sep="\n")
    console.print(
        "python -m kdrl_train <command> --help explains the main options, --help-all all."
    )
