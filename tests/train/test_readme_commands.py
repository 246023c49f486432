"""The READMEs of the trainer: each command in their blocks is one that the command line reads."""

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from kdrl_train.cli import parse
from kdrl_train.commands import COMMANDS

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", *sorted((ROOT / "kdrl_train").rglob("README.md"))]


def commands(text: str) -> list[str]:
    """Read the commands in the blocks of a README, without what stands for more options."""
    blocks = re.findall(r"^```.*?\n(.*?)^```$", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [line.partition("-m kdrl_train ")[2] for line in lines]
    of_a_run = r"\.\.\.|--config \S*\.yaml"  # there is no such run here
    return [re.sub(of_a_run, "", command) for command in words if command]


@pytest.mark.slow
def test_commands_are_read() -> None:
    lines = [line for path in READMES for line in commands(path.read_text(encoding="utf-8"))]
    for line in lines:
        name, *options = shlex.split(line, comments=True)
        module, _, settings = f"kdrl_train.{COMMANDS[name].settings}".rpartition(".")
        default: Any = getattr(import_module(module), settings)()
        rules, _, function = f"kdrl_train.{COMMANDS[name].rules}".rpartition(".")
        unread = getattr(import_module(rules), function, lambda _: {})
        try:
            parse(default, options, name, "", unread=unread)
        except (ValueError, SystemExit) as error:
            pytest.fail(f"{line}: {error}")
    assert {line.split()[0] for line in lines} == set(COMMANDS)
