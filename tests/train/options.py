"""Reads options as the command line does, for tests of settings."""

from pathlib import Path

from kdrl_train import cli
from kdrl_train.commands import COMMANDS
from kdrl_train.config import (
    TrainConfig,
)


def parse(*options: str) -> TrainConfig:
    """Return the settings that `train` makes of the options."""
    command = COMMANDS["train"]
    return cli.parse(TrainConfig(), options, "train", command.help, command.options)


def write(path: Path, text: str) -> str:
    """Write a file and return its path."""
    path.write_text(text, encoding="utf-8")
    return str(path)
