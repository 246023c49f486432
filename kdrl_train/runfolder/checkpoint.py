"""Checkpoints: model, optimizer, step and random state, complete or absent, never in between.

    checkpoints/step_000050/   torch.distributed.checkpoint files and meta.json
    checkpoints/LATEST         name of the newest one, for scripts: `latest` goes by the names
    checkpoints/.tmp_*         being written or deleted; ignored, and removed by the next save

A folder gets its final name by a rename after everything in it has reached the disk, so a process
killed at any moment leaves the previous checkpoint as the newest. Every rank writes its shards, and
any number of ranks can read them. Of the random state the CPU generator suffices: dropout is off,
and every other draw is seeded by (seed, step).
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from kdrl_train.config import TrainConfig
from kdrl_train.config_file import to_dict
from kdrl_train.ranks import ALONE, World

ROLLOUTS = "rollouts.pt"
"""In a checkpoint of a run that draws them ahead: the next step's."""

_NAME = re.compile(r"step_(\d{6,})")
ONE_PROCESS = "torch.distributed is disabled"
"""What a save without a process group warns of."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    """Optimiser steps done."""
    config: dict[str, Any]
    """Resolved configuration of the run that wrote it."""
    files: dict[str, int]
    """Name and size in bytes of every file beside meta.json."""


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None."""
    found = checkpoints(folder)
    if not found:
        return None
    return read(found[-1])


def read(folder: Path) -> Checkpoint:
    """What a checkpoint folder says of itself.

    Raises: ValueError for a folder that is none, or of which a file is missing or was cut.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        found = Checkpoint(folder, meta["step"], meta["config"], meta["files"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} must be a checkpoint folder with a meta.json, got {error!r}: name one of "
            "checkpoints/step_*, or delete it to resume from the one before"
        ) from error
    for name, size in found.files.items():
        path = folder / name
        there = path.stat().st_size if path.exists() else None
        if there != size:
            raise ValueError(
                f"{path} must have {size} bytes as when it was saved, got "
                f"{'no such file' if there is None else there}: the checkpoint is damaged; delete "
                f"{folder} to resume from the one before"
            )
    return found


def save(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    world: World = ALONE,
    rollouts: dict[str, Any] | None = None,
) -> Path:
    """Write the state after `step` optimiser steps, then delete all but the newest ones.

    Args:
        folder: the run's checkpoints folder, of a file system that all ranks see; made if absent.
        step: optimiser steps done.
        config: it goes in whole; config.keep_checkpoints are kept.
        world: all ranks call it together.
        rollouts: of the next step, where they are drawn already: written by rank 0.
    Returns: the checkpoint's folder.
    Raises: OSError where it cannot be written (a full disk, say); what was there before is whole.
    """
    with writing(folder, step) as work:
        world.on_main(lambda: clean(folder))
        with _quiet():
            dcp.save(whole_state(model, optimizer), checkpoint_id=work, no_dist=not world.launched)
        world.on_main(lambda: publish(work, step, config, rollouts))
    return folder_of(folder, step)


@contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """Where a checkpoint is written; an error removes it and says so."""
    work = folder / f".tmp_{folder_of(folder, step).name}"
    try:
        yield work
    except (OSError, CheckpointException) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {step} must be written to {folder}, got {_cause(error)}: free "
            "space or correct --out, then --resume from the one before"
        ) from error


def folder_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def clean(folder: Path) -> None:
    """Make the folder; remove what a killed save or removal left."""
    folder.mkdir(parents=True, exist_ok=True)
    for rest in folder.glob(".tmp_*"):
        rest.unlink() if rest.is_file() else shutil.rmtree(rest)


def publish(work: Path, step: int, config: TrainConfig, rollouts: dict[str, Any] | None) -> None:
    """Give a written checkpoint its name, and delete all but the newest ones."""
    final = folder_of(work.parent, step)
    if rollouts is not None:
        torch.save(rollouts, work / ROLLOUTS)
    meta = {
        "step": step,
        "config": to_dict(config),
        "torch": torch.__version__,
        "files": {path.name: path.stat().st_size for path in sorted(work.iterdir())},
    }
    _write(work / "meta.json", json.dumps(meta, indent=1))
    if final.exists():  # of the same step, written before a resume from an older one
        _remove(final)
    _sync(work)
    work.rename(final)
    _sync(final.parent)
    pointer = final.with_name(".tmp_LATEST")
    _write(pointer, final.name + "\n")
    pointer.rename(final.with_name("LATEST"))
    for old in checkpoints(final.parent)[: -config.keep_checkpoints]:
        _remove(old)


def _write(path: Path, text: str) -> None:
    """Write a small file through to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _cause(error: BaseException) -> str:
    """What went wrong on the first rank that failed, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def load(
    checkpoint: Checkpoint,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Load a checkpoint into model, optimizer and the global random state.

    Whether its configuration fits the run is checked by resume.open_folder.

    Returns: optimiser steps done.
    Raises: ValueError for a checkpoint of another architecture, or a damaged one.
    """
    state = whole_state(model, optimizer)
    _read_into(state, checkpoint.folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    torch.set_rng_state(state["rng"])
    return checkpoint.step


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint folder, and nothing else.

    Raises: ValueError for a folder that is no whole checkpoint, or of another architecture.
    """
    state = {"model": get_model_state_dict(model)}
    _read_into(state, read(folder).folder)
    set_model_state_dict(model, state["model"])


def _read_into(state: dict[str, Any], folder: Path) -> None:
    """Fill a state from a checkpoint; ValueError where they do not fit."""
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError) as error:
        raise ValueError(
            f"{folder} must hold the state of this model, got {_cause(error)}: resume with the "
            "same architecture, or delete a damaged checkpoint to resume from the one before"
        ) from error


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optim_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optim_state, "rng": torch.get_rng_state()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process, which no_dist=True has just said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ONE_PROCESS)
        yield


def _remove(folder: Path) -> None:
    """Delete a checkpoint; its name goes first, so that a half-deleted one is never read."""
    doomed = folder.with_name(f".tmp_{folder.name}_old")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _sync(folder: Path) -> None:
    """Flush every file of a folder, and its directory entry, to the disk."""
    if os.name == "nt":  # refuses it for directories; the files were flushed as they were written
        return
    for path in [*folder.iterdir(), folder]:
        if path.is_dir() and path != folder:
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
