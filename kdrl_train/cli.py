"""Command line: `python -m kdrl_train <command>`. Defaults < preset < YAML file < options."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
from rich.console import Console
from rich.markup import escape

from kdrl_train.config import EvaluateConfig, TrainConfig
from kdrl_train.config_file import load_yaml, update
from kdrl_train.errors import RunError
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.presets import PRESETS

T = TypeVar("T")
PresetName = Literal[
    "grpo",
    "kd_rkl",
    "kdrl",
    "kdrl_annealed",
    "kdrl_masked",
    "kdrl_group_masked",
    "opd_then_rl",
    "reward_shaping",
]

PROGRAM = "python -m kdrl_train"
COMMANDS = {
    "demo": "small models on a made-up task, trained with KDRL in minutes; needs nothing",
    "train": "train a policy with a reward and a teacher",
    "eval": "measure a saved model: avg@k, pass@k, length",
    "check": "preflight of a training run: a table, and an exit code of 1 if it would fail",
    "replay": "take a step that stopped a run apart, completion by completion",
    "report": "one HTML page about one or many runs: curves, differences, samples, events",
    "plan": "memory of each GPU and time of a step, predicted from the models' config.json",
    "serve": "score with a teacher for trainers elsewhere, over HTTP",
    "sft": "train a small model and its tokenizer from scratch on solved problems",
}
MODULES = {
    "demo": "tools.demo",
    "train": "train",
    "eval": "tools.evaluate",
    "check": "start.preflight",
    "replay": "tools.replay",
    "report": "tools.report",
    "plan": "tools.plan.command",
    "serve": "tools.serve.command",
    "sft": "tools.sft",
}
EPILOG = """Settings come from, each overriding those before it: the defaults, --preset, the YAML
file given with --config, the options. A run's own config.yaml can be given with --config."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Generic[T]):
    """What every command takes beside its own settings."""

    config: Path | None = None
    """YAML file with any part of the settings below; an unknown key is an error."""
    run: Annotated[T, tyro.conf.arg(name="")] = field()
    """The command's settings."""


@dataclass(frozen=True, kw_only=True)
class PresetArguments(Arguments[T]):
    """The same for commands that train."""

    preset: PresetName | None = None
    """Method to start from; options under --method change parts of it."""


def parse(default: T, argv: Sequence[str], command: str, program: str = PROGRAM) -> T:
    """Settings of a command.

    Args:
        default: the configuration dataclass with its defaults; `method` makes it take --preset.
        argv: arguments after the command's name.
        command: its name, for the usage line and its description in COMMANDS.
        program: what starts it, for the usage line.
    Raises: ValueError for a YAML file with an unknown key, a wrong value, or that leaves nothing
        to --preset; SystemExit from tyro for --help and for a wrong option.
    """
    names = {f.name for f in fields(default)}  # type: ignore[arg-type]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    if "method" in names:
        first.add_argument("--preset")
    early, _ = first.parse_known_args(list(argv))
    file = {} if early.config is None else load_yaml(Path(early.config))
    preset = getattr(early, "preset", None)
    if preset in PRESETS:
        default = replace(default, method=PRESETS[preset])  # type: ignore[type-var]
        if {f.name for f in fields(MethodConfig)} <= set(file.get("method") or {}):
            raise ValueError(
                f"--preset must leave something to set, got {preset} and {early.config}, which "
                "sets every key of method: remove that section, or the preset"
            )
    default = update(default, file)
    arguments: Any = PresetArguments if "method" in names else Arguments
    parsed = tyro.cli(
        arguments[type(default)],
        default=arguments(run=default),
        args=list(argv),
        prog=f"{program} {command}".rstrip(),
        description=f"{COMMANDS.get(command, '')}\n\n{EPILOG}".lstrip(),
    )
    return parsed.run


def run(command: str, argv: Sequence[str]) -> int:
    """One command; returns its exit code. Each imports only what it needs."""
    module = _module(MODULES[command])
    if command in ("train", "check", "eval"):
        config: Any = EvaluateConfig() if command == "eval" else TrainConfig()
    else:
        config = getattr(module, f"{command.capitalize()}Config")()
    result = module.main(parse(config, argv, command))
    return result if command in ("check", "plan") else 0


def _module(name: str) -> Any:
    """A command's module, imported when it is needed: --help must not wait for torch."""
    module = importlib.import_module(f"kdrl_train.{name}")
    importlib.import_module("transformers").logging.disable_progress_bar()  # one bar per model file
    return module


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 refused with a message, 2 wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    console = Console(stderr=True, highlight=False)
    if not argv or argv[0] in ("-h", "--help"):
        Console(highlight=False).print(usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        names = ", ".join(COMMANDS)
        console.print(f"[bold red]error[/]: command must be one of {names}, got {escape(argv[0])}")
        return 2
    return exit_code(lambda: run(argv[0], argv[1:]), console)


def exit_code(command: Callable[[], int], console: Console) -> int:
    """What a command returns; 1, after its message, where it refuses."""
    try:
        return command()
    except (ValueError, OSError, FloatingPointError, RunError) as error:
        console.print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True)
        return 1


def usage() -> str:
    """The list of commands, as rich markup."""
    lines = [f"  [bold]{name:6}[/] {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m kdrl_train <command> \\[options]",
            "",
            *lines,
            "",
            "python -m kdrl_train <command> --help explains every option with its unit.",
        ]
    )
