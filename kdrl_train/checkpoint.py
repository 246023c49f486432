"""Checkpoints: model, optimizer, step and random state, complete or absent, never in between.

    checkpoints/step_000050/   torch.distributed.checkpoint files and meta.json
    checkpoints/.tmp_*         being written or deleted; ignored, and removed by the next save

A folder gets its final name by a rename after everything in it has reached the disk, so a process
killed at any moment leaves the previous checkpoint as the newest. Of the random state the CPU
generator suffices: dropout is off, and every other draw is seeded by (seed, step).
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
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from kdrl_train.config import TrainConfig
from kdrl_train.config_file import differences, to_dict

MAY_CHANGE = (
    "out",
    "resume",
    "steps",
    "save_every",
    "keep_checkpoints",
    "samples_per_step",
    "eval",
    "log",
    "reward.workers",
    "model.device",
    "model.attention",
    "model.gradient_checkpointing",
    "model.liger",
    "optim.micro_batch_tokens",
    "optim.workspace_bytes",
    "optim.head_impl",
)
"""Keys that a resumed run may set anew: they do not change what the training converges to."""

_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    """Optimiser steps done."""
    config: dict[str, Any]
    """Resolved configuration of the run that wrote it."""


def _fixed(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The keys outside MAY_CHANGE."""
    out = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key not in MAY_CHANGE:
            out[name] = _fixed(value, f"{key}.") if isinstance(value, dict) else value
    return out


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None."""
    found = checkpoints(folder)
    if not found:
        return None
    meta = json.loads((found[-1] / "meta.json").read_text(encoding="utf-8"))
    return Checkpoint(found[-1], meta["step"], meta["config"])


def open_folder(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that a run continues from; None for a new run. Changes nothing.

    Raises: ValueError for a used folder without resume, and for resume where there is no
        checkpoint, or one of another configuration.
    """
    newest = latest(config.out / "checkpoints")
    if config.resume:
        if newest is None:
            raise ValueError(
                f"out must hold a checkpoint to resume from, got {config.out}, which has none: "
                "drop --resume, or correct --out"
            )
        check_config(newest, config)
        return newest
    used = [n for n in ("config.yaml", "metrics.jsonl", "checkpoints") if (config.out / n).exists()]
    if used:
        remedy = "choose another --out"
        if newest is not None:
            remedy = f"pass --resume to continue that run, or {remedy}"
        raise ValueError(
            f"out must be a new folder, got {config.out}, which holds {', '.join(used)}: {remedy}"
        )
    return None


def save(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> Path:
    """Write the state after `step` optimiser steps, then delete all but the newest ones.

    Args:
        folder: the run's checkpoints folder; made if absent.
        step: optimiser steps done.
        config: it goes in whole; config.keep_checkpoints are kept.
    Returns: the checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rest in folder.glob(".tmp_*"):
        shutil.rmtree(rest)
    final = folder / f"step_{step:06d}"
    work = folder / f".tmp_{final.name}"
    with _single_process():
        dcp.save(_state(model, optimizer), checkpoint_id=work, no_dist=True)
    meta = {"step": step, "config": to_dict(config), "torch": torch.__version__}
    with (work / "meta.json").open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # of the same step, written before a resume from an older one
        _remove(final)
    _sync(work)
    work.rename(final)
    _sync(folder)
    for old in checkpoints(folder)[: -config.keep_checkpoints]:
        _remove(old)
    return final


def load(
    checkpoint: Checkpoint,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> int:
    """Load a checkpoint into model, optimizer and the global random state.

    Returns: optimiser steps done.
    Raises: ValueError when the checkpoint's configuration differs outside MAY_CHANGE.
    """
    check_config(checkpoint, config)
    state = _state(model, optimizer)
    with _single_process():
        dcp.load(state, checkpoint_id=checkpoint.folder, no_dist=True)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    torch.set_rng_state(state["rng"])
    return checkpoint.step


def check_config(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Raise ValueError with the differing keys unless `config` may continue the checkpoint."""
    changed = differences(_fixed(checkpoint.config), _fixed(to_dict(config)))
    if changed:
        lines = [f"  {key}: {old} there, {new} now" for key, (old, new) in changed.items()]
        raise ValueError(
            f"a resumed run must keep the settings of {checkpoint.folder}, got other values:\n"
            + "\n".join(lines)
            + "\nset them back, or start a new run with another --out"
        )


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optim_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optim_state, "rng": torch.get_rng_state()}


@contextmanager
def _single_process() -> Iterator[None]:
    """Without the warning that there is one process, which no_dist=True has just said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
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


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a transformers folder that from_pretrained loads; an older one is replaced."""
    work = folder.with_name(f".tmp_{folder.name}")
    if work.exists():
        shutil.rmtree(work)
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)
