"""Saves a run's checkpoints one at a time: while the trainer waits, or (save_async) in a thread.

All ranks call every method together, except close. Which checkpoints are on the disk is decided by
`checkpoint` alone: a process that is killed leaves the newest one that was whole.
"""

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from kdrl_train.config import TrainConfig
from kdrl_train.ranks import BACKSTOP, World
from kdrl_train.runfolder import checkpoint
from kdrl_train.runfolder.best import BestSoFar
from kdrl_train.runfolder.checkpoint import RunState
from kdrl_train.runfolder.finite import require_finite
from kdrl_train.runfolder.hashes import HashingWriter


class Saver:
    """Writes the checkpoints of a run.

    Args:
        config: the configuration of the run; out and save_async are read, and all of it is saved.
        say: called with a line for each checkpoint that is on the disk.
        data: which problems the run has, as in RunState.
        saved: optimiser steps of the checkpoint, if any, from which the run starts.
        require_ours: raises RunError on rank 0 where another run has begun in the folder.
        best: as in RunState.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        say: Callable[[str], None],
        data: dict[str, dict[str, Any]],
        saved: int = 0,
        require_ours: Callable[[], None] = lambda: None,
        best: BestSoFar | None = None,
    ) -> None:
        self.config = config
        self.best = best
        self.data = data
        self.require_ours = require_ours
        self.world = world
        self.say = say
        self.saved = saved
        """Optimiser steps of the newest checkpoint that is on the disk."""
        self._group: dist.ProcessGroup | None = None
        if config.save_async and world.launched:
            self._group = dist.new_group(backend="gloo", timeout=BACKSTOP)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._future: Future[Path] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rollouts: dict[str, Any] | None,
        wait: bool = False,
        teacher: nn.Module | None = None,
    ) -> None:
        """Save a checkpoint after `step` optimiser steps; the arguments are those of RunState, and
        `wait`: whether to be done with it on return.

        An earlier checkpoint that is still being written is waited for.

        Raises: OSError if this checkpoint or that earlier one cannot be written;
            BrokenWeightsError for weights or moments that are not finite; RunError where another
            run has begun in the folder.
        """
        self.check(wait=True)
        self.world.on_main(self.require_ours)
        require_finite(model, optimizer, step, self.world)
        folder = self.config.out / "checkpoints"
        state = RunState(
            step=step,
            model=model,
            optimizer=optimizer,
            config=self.config,
            data=self.data,
            rollouts=rollouts,
            teacher=teacher,
            require_ours=self.require_ours,
            best=copy.copy(self.best),  # a thread reads it later
        )
        if self.config.save_async and not wait:
            self._future = self._pool.submit(begin(folder, state, self.world, self._group))
            self._step = step
        else:
            checkpoint.save(folder, state, self.world)
            self._written(step)

    def check(self, *, wait: bool = False) -> None:
        """Report the checkpoint that the thread writes, if it is done; with `wait` once it is.

        Raises: OSError if it could not be written; RankError if it failed on another rank.
        """
        future = self._future
        if future is None:
            return
        try:
            written = self.world.share(lambda: future.result() if wait or future.done() else None)
        except Exception:
            self._future = None
            raise
        if None not in written:
            self._future = None
            self._written(self._step)

    def drop(self) -> None:
        """Wait for the thread and forget what it wrote or met, of which ranks that fail may know
        different things. A rank may call it alone."""
        if self._future is not None:
            self._future.exception()
            self._future = None

    def _written(self, step: int) -> None:
        """Note that a checkpoint is on the disk."""
        self.saved = step
        self.say(f"saved {checkpoint.folder_of(self.config.out / 'checkpoints', step)}")

    def close(self) -> None:
        """Wait for the thread; may be called twice."""
        self._pool.shutdown()
        if self._future is not None and (error := self._future.exception()) is not None:
            self.say(f"{type(error).__name__}: {error}")


def begin(
    folder: Path, state: RunState, world: World, group: dist.ProcessGroup | None
) -> Callable[[], Path]:
    """Begin what checkpoint.save does: copy the state to the CPU and start a thread that writes it.

    Args:
        folder, state, world: the arguments of checkpoint.save.
        group: a process group of all ranks on the CPU, which the writing threads use and nothing
            else may use; None in one process.
    Returns: the second part, to be called in another thread. It waits until the files are written,
        gives the checkpoint its name and returns its folder.
    Raises: OSError if the checkpoint cannot be written; the second part does so too.
    """
    tensors = checkpoint.whole_state(state.model, state.optimizer, state.teacher)
    with checkpoint.writing(folder, state.step) as work:
        world.on_main(lambda: checkpoint.clean(folder))
        # without a block that ends: the warning comes from another thread
        warnings.filterwarnings("ignore", message=checkpoint.ONE_PROCESS)
        writer = HashingWriter(work, state.config.checkpoint_hashes)
        saving = dcp.async_save(
            tensors,
            storage_writer=writer,
            process_group=group,
            no_dist=not world.launched,
        )
    assert isinstance(saving, Future)

    def finish() -> Path:
        """Wait for the files, then name the checkpoint."""
        with checkpoint.writing(folder, state.step) as work:
            saving.result()
            if world.main:  # its result says that all ranks have written
                checkpoint.publish(work, state, writer.hashes)
        return checkpoint.folder_of(folder, state.step)

    return finish
