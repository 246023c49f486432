"""The errors, besides ValueError and OSError, that end a run with a message for its user."""

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


class RunError(RuntimeError):
    """An error whose message the command line prints before it exits with 1."""


class EngineError(RunError):
    """The engine does not sample from the policy that is being trained."""


class RewardError(RunError, ValueError):
    """The reward function failed on every completion of a prompt."""


class MidStepError(RunError):
    """A later update of a step failed: the weights belong to no whole step."""


class BrokenWeightsError(MidStepError, FloatingPointError):
    """An update left weights, moments or logits that are not finite: they are never saved."""


class RankError(RunError):
    """Some rank failed; the message names that rank and repeats its error."""


class ExtraError(RunError):
    """A package is missing; the message names the command that installs it with its extra."""


PRINTED = (ValueError, OSError, FloatingPointError, RunError)
"""Errors whose message is enough: the command line prints it. Others keep their traceback."""


def describe(error: BaseException) -> str:
    """Say in a line what an error is; of one that needs its traceback, also the end of that."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, PRINTED) or not frames:
        return text
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line})"


def import_users(name: str, rule: str) -> ModuleType:
    """Import a module of the user's own, which a setting names.

    rule: what the setting must be, with which a message begins.

    Raises: ValueError in one line where the module is missing, has a mistake or ends the process.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{rule}: {error}; install it or run from its folder") from error
    except (Exception, SystemExit) as error:  # a module is a program
        ours = {__file__, importlib.__file__}
        frames = [
            f"{frame.filename}, line {frame.lineno}: "
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename not in ours and not frame.filename.startswith("<frozen ")
        ]
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{rule}: the module {name} must be imported, got {''.join(frames[:1])}{said}: correct "
            "it"
        ) from error


def require_file(path: Path) -> None:
    """Raise ValueError where something else stands: opening a pipe waits for its other end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a file, got a folder, pipe or device: move it away")


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Name in an OSError of the block the file that cannot be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} must be written, got {error}: free space there or make it writable, then run "
            "the command again, train with --resume"
        ) from error


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Raise an ExtraError for a package of an extra that the block cannot import."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("kdrl_kernels", "kdrl_train"):
            raise  # a mistake of ours, which keeps its traceback
        raise ExtraError(
            f"the packages of the extra {name} must be installed, got {error}: "
            f"pip install 'kdrl-kernels[{name}]'"
        ) from error
