"""Writes and reads checkpoints: model, optimizer, step and random state, each whole or absent.

    checkpoints/step_000050/   torch.distributed.checkpoint files and meta.json
    checkpoints/LATEST         name of the newest one, for scripts; `latest` does not read it
    checkpoints/.tmp_*         being written or deleted; ignored, and removed by the next save

A folder gets its final name by a rename after everything in it has reached the disk, so a process
killed at any moment leaves the previous checkpoint as the newest. Every rank writes its shards, and
any number of ranks can read them. The state of the CPU generator is the only random state saved,
and it suffices: dropout is off, and every other draw is seeded by (seed, step).
"""

import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from kdrl_train import output
from kdrl_train.config import ModelConfig, TrainConfig
from kdrl_train.config_file import to_dict
from kdrl_train.errors import RunError
from kdrl_train.ranks import ALONE, World
from kdrl_train.runfolder.adapters import check_adapters, has_adapters, of_trained
from kdrl_train.runfolder.best import BestSoFar, resolved
from kdrl_train.runfolder.durable import point_to, sync, write_through
from kdrl_train.runfolder.hashes import HashingWriter, require_same, sealed, sha256_of, unsealed
from kdrl_train.runfolder.untrusted import Planner, Reader
from kdrl_train.runfolder.writable import remove

ROLLOUTS = "rollouts.pt"
"""The file with the next step's completions, in a checkpoint of a run that prefetches them."""

_NAME = re.compile(r"step_(\d{6,})")
ONE_PROCESS = "torch.distributed is disabled"
"""The beginning of the warning that a save without a process group raises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What a checkpoint saves of a run."""

    step: int
    """Optimiser steps done."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    """The whole of it is saved; its keep_checkpoints and keep_every say which checkpoints stay."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Which problems the run has: the name of a section of the settings -> count and sha256."""
    rollouts: dict[str, Any] | None = None
    """The next step's completions, if they are drawn already; rank 0 writes them."""
    teacher: nn.Module | None = None
    """A teacher whose weights the run changes; None: there is none."""
    require_ours: Callable[[], None] = lambda: None
    """Raises RunError where another run has begun in the folder: nothing gets a name then."""
    best: BestSoFar | None = None
    """The best evaluation, whose checkpoint stays; None: eval.keep_best is off."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on the disk."""

    folder: Path
    step: int
    """Optimiser steps done."""
    config: dict[str, Any]
    """The whole configuration of the run that wrote it."""
    files: dict[str, int]
    """The size in bytes of every file but meta.json, by its name."""
    data: dict[str, dict[str, Any]]
    """RunState.data; empty in checkpoints from before it was saved."""
    hashes: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of every file but meta.json; empty where the run had them switched off, and in
    checkpoints from before they were saved."""


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints in `folder`, oldest first."""
    complete = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step_")))


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint, or None if there is none.

    Raises: ValueError if it is damaged, or has the name of another step: it would stay the newest
        whatever is saved after it.
    """
    complete = checkpoints(folder)
    if not complete:
        return None
    newest = read(complete[-1])
    if newest.folder != folder_of(folder, newest.step):
        raise ValueError(
            f"{newest.folder} must be the checkpoint of the step in its name, got that of step "
            f"{newest.step}: rename it to {folder_of(folder, newest.step).name}, or delete it"
        )
    return newest


def read(folder: Path) -> Checkpoint:
    """Read the description of a checkpoint folder, and check that its files have their sizes.

    Raises: ValueError for a folder that is no checkpoint, or has a missing or shortened file.
    """
    try:
        if not (folder / "meta.json").is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError("no regular file meta.json")
        meta = unsealed((folder / "meta.json").read_text(encoding="utf-8"))
        checkpoint = Checkpoint(
            folder,
            meta["step"],
            meta["config"],
            dict(meta["files"]),
            meta.get("data", {}),
            dict(meta.get("sha256", {})),
        )
        values = (checkpoint.step, checkpoint.config, checkpoint.data)
        if not all(map(isinstance, values, (int, dict, dict))):
            raise ValueError("another kind of value for step, config or data")
        sections = [checkpoint.config.get(name, {}) for name in ("model", "reward")]
        counts = [section["count"] for section in checkpoint.data.values()]
        if not all(type(one) is dict for one in sections) or {*map(type, counts)} - {int}:
            raise ValueError("another kind of value in config or data")
        if checkpoint.hashes and checkpoint.hashes.keys() != checkpoint.files.keys():
            raise ValueError("hashes of other files than it has")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder} must be a checkpoint folder with a meta.json, got {error!r}: name one of a "
            "run's checkpoints/step_*; if it is one, it is damaged: delete it to resume from the "
            "previous checkpoint"
        ) from error
    for name, size in checkpoint.files.items():
        path = folder / name
        here = path.parent == folder and path.is_file()
        size_now = path.stat().st_size if here else None
        if size_now != size:
            raise ValueError(
                f"{path} must have {size} bytes as when it was saved, got "
                f"{'no such file' if size_now is None else size_now}: the checkpoint is damaged; "
                f"delete {folder} to resume from the previous checkpoint"
            )
    return checkpoint


def save(folder: Path, state: RunState, world: World = ALONE) -> Path:
    """Write a checkpoint, then delete the old ones that the configuration does not keep.

    Args:
        folder: the run's checkpoints folder, made if absent, on a file system that all ranks see.
        world: the ranks of the run, which all call this together.
    Returns: the checkpoint's folder.
    Raises: OSError if it cannot be written (a full disk, say); earlier checkpoints stay whole.
    """
    tensors = whole_state(state.model, state.optimizer, state.teacher)
    with writing(folder, state.step) as work:
        world.on_main(lambda: clean(folder))
        writer = HashingWriter(work, state.config.checkpoint_hashes)
        with _quiet():
            dcp.save(tensors, storage_writer=writer, no_dist=not world.launched)
        world.on_main(lambda: publish(work, state, writer.hashes))
    return folder_of(folder, state.step)


@contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """Yield the folder in which a checkpoint is written; an error removes it.

    Raises: OSError naming the checkpoint that could not be written, and the cause; a RunError of
        the block.
    """
    work = folder / f".tmp_{folder_of(folder, step).name}"
    try:
        yield work
    except (OSError, CheckpointException, RuntimeError) as error:  # the last one of torch.save
        if type(error) is RunError:  # another run has the folder, and may be writing into it
            raise
        shutil.rmtree(work, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {step} must be written to {folder}, got {_cause(error)}: free "
            "space or correct --out, then --resume"
        ) from error


def folder_of(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimiser steps."""
    return folder / f"step_{step:06d}"


def clean(folder: Path) -> None:
    """Make the checkpoints folder, and remove what a killed save or removal left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp_*"):
        remove(leftover)


def publish(work: Path, state: RunState, hashes: dict[str, str]) -> None:
    """Give a written checkpoint its name, and delete the oldest ones that need not be kept.

    hashes: of the files that ranks have written; those of rank 0's small ones are added.
    """
    final = folder_of(work.parent, state.step)
    if state.rollouts is not None:
        torch.save(state.rollouts, work / ROLLOUTS)
    files = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
    if state.config.checkpoint_hashes:
        hashes = {name: hashes.get(name) or sha256_of(work / name) for name in files}
    meta = {
        "step": state.step,
        "config": to_dict(state.config),
        "data": state.data,
        "torch": torch.__version__,
        "files": files,
        "sha256": hashes,
    }
    write_through(work / "meta.json", sealed(meta))
    state.require_ours()
    if state.best is not None and state.best.is_after(state.step):
        state.best.write()
    if final.exists():  # written before the run was resumed from an older checkpoint
        _remove(final)
    log = (final.parent.parent / name for name in ("metrics.jsonl", "events.jsonl"))
    sync(work, *log)  # after a power cut the records of the steps that are saved exist, too
    work.rename(final)
    sync(final.parent)
    point_to(final)
    every = state.config.keep_every
    for old in checkpoints(final.parent)[: -state.config.keep_checkpoints]:
        step = int(old.name.removeprefix("step_"))
        is_best = state.best is not None and state.best.is_after(step)
        if not is_best and (not every or step % every):
            _remove(old)


def _cause(error: BaseException) -> str:
    """Say in one line what went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error.__context__, OSError):  # torch.save raises another one behind it
        error = error.__context__
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def load(
    checkpoint: Checkpoint,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    teacher: nn.Module | None = None,
    world: World = ALONE,
    hashes: bool = True,
) -> int:
    """Load a checkpoint into model, optimizer and the global random state, on all ranks together.

    resume.open_folder has checked that its configuration fits the run.

    Args:
        teacher: as in RunState.
        hashes: whether to compare the files with their hashes first.
    Returns: the number of optimiser steps done.
    Raises: ValueError for a checkpoint of another architecture, or a damaged one.
    """
    if hashes:
        check_files(checkpoint, world)
    state = whole_state(model, optimizer, teacher)
    _read_into(state, checkpoint, world)
    if teacher is not None:
        set_model_state_dict(teacher, state["teacher"])
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=not has_adapters(model)),
    )
    torch.set_rng_state(state["rng"])
    return checkpoint.step


def load_weights(
    folder: Path,
    model: nn.Module,
    world: World = ALONE,
    hashes: bool = True,
    of: Literal["model", "teacher"] = "model",
    config: ModelConfig | None = None,
) -> list[str]:
    """Load the weights of a checkpoint folder, and nothing else, on all ranks together.

    Args:
        folder: or a run's best.json, which names one.
        hashes: whether to compare the files with their hashes first.
        of: which weights, those of the policy or those of RunState.teacher.
        config: of the model; its lora says whether it has adapters, which are read alone then.
            None: it has none.
    Returns: what to warn of.
    Raises: ValueError for a folder that is no whole checkpoint, for another architecture, and for
        one of other adapters.
    """
    checkpoint = read(resolved(folder))
    doubts = check_adapters(folder, checkpoint.config.get("model", {}), config or ModelConfig())
    state: dict[str, Any] = {of: of_trained(model, get_model_state_dict(model))}
    if hashes:
        check_files(checkpoint, world)
    _read_into(state, checkpoint, world)
    options = StateDictOptions(strict=not has_adapters(model))
    set_model_state_dict(model, state[of], options=options)
    return doubts + (unchecked(checkpoint) if hashes else [])


def check_files(checkpoint: Checkpoint, world: World) -> None:
    """Compare the files with their hashes: each file once, the ranks a part of them each.

    Raises: ValueError for a file that has changed; RankError where that is on several ranks.
    """
    files = checkpoint.files
    output.begin(f"checking {sum(files.values()) / 1e9:,.1f} GB of {checkpoint.folder.name}")
    names = sorted(checkpoint.hashes, key=lambda name: -files[name])[world.rank :: world.size]
    world.share(lambda: require_same(checkpoint.folder, checkpoint.hashes, names))
    output.begin(f"reading {checkpoint.folder.name}")


def unchecked(checkpoint: Checkpoint) -> list[str]:
    """Say what cannot be checked of a checkpoint."""
    if checkpoint.hashes:
        return []
    return [
        f"{checkpoint.folder} has no hashes of its files, as it was saved by an older version or "
        "with checkpoint_hashes false: bits that have changed on the disk are not noticed"
    ]


def _read_into(state: dict[str, Any], checkpoint: Checkpoint, world: World) -> None:
    """Fill a state from a checkpoint; ValueError if they do not fit."""
    folder = checkpoint.folder
    reader = Reader(folder, set(checkpoint.files))
    world.share(reader.open)
    try:
        with _quiet():
            dcp.load(
                state,
                storage_reader=reader,
                planner=Planner(),
                no_dist=not dist.is_initialized(),
            )
    except (CheckpointException, RuntimeError) as error:
        raise ValueError(
            f"{folder} must hold the state of this model, got {_cause(error)}: resume with the "
            "same architecture, or delete a damaged checkpoint to resume from the previous one"
        ) from error


def whole_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, teacher: nn.Module | None = None
) -> dict[str, Any]:
    """Collect the tensors that a checkpoint holds: model, optimizer, random state, and the weights
    of a teacher that the run changes. Of a model with adapters these are the adapters alone."""
    model_state, optim_state = get_state_dict(model, optimizer)
    trained = of_trained(model, model_state)
    state = {"model": trained, "optimizer": optim_state, "rng": torch.get_rng_state()}
    if teacher is not None:
        state["teacher"] = get_model_state_dict(teacher)
    return state


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence within the block the warning that there is no process group, which is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ONE_PROCESS)
        yield


def _remove(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a half-deleted one is never read."""
    renamed = folder.with_name(f".tmp_{folder.name}_old")
    folder.rename(renamed)
    remove(renamed)
