"""A run's checkpoints, one at a time: the trainer waits for the disk, or (save_async) goes on.

All ranks call every method together, but for close. Nothing else than `checkpoint` decides what is
on the disk at any moment: a process that is killed leaves the newest checkpoint that was whole.
"""

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
from kdrl_train.ranks import TIMEOUT, World
from kdrl_train.runfolder import checkpoint


class Saver:
    """Writes the checkpoints of a run.

    Args:
        config: out, save_async, keep_checkpoints.
        say: where a checkpoint that is on the disk is reported.
    """

    def __init__(self, config: TrainConfig, world: World, say: Callable[[str], None]) -> None:
        self.config = config
        self.world = world
        self.say = say
        self._group: dist.ProcessGroup | None = None
        if config.save_async and world.launched:
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._future: Future[Path] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rollouts: dict[str, Any] | None,
    ) -> None:
        """See checkpoint.save. One that is still being written is waited for.

        Raises: OSError for this checkpoint, or that one.
        """
        self.check(wait=True)
        folder, config, world = self.config.out / "checkpoints", self.config, self.world
        state: dict[str, Any] = {
            "step": step,
            "model": model,
            "optimizer": optimizer,
            "config": config,
            "world": world,
            "rollouts": rollouts,
        }
        if config.save_async:
            self._future = self._pool.submit(begin(folder, group=self._group, **state))
        else:
            self.say(f"saved {checkpoint.save(folder, **state)}")

    def check(self, *, wait: bool = False) -> None:
        """Report the checkpoint that was being written, if it is done; wait: until it is.

        Raises: OSError where it could not be written; RankError where that was on another rank.
        """
        future = self._future
        if future is None:
            return
        try:
            done = self.world.share(lambda: future.result() if wait or future.done() else None)
        except Exception:
            self._future = None
            raise
        if None not in done:
            self._future = None
            self.say(f"saved {done[0]}")

    def close(self) -> None:
        """Wait for the thread; may be called twice."""
        self._pool.shutdown()
        if self._future is not None and (error := self._future.exception()) is not None:
            self.say(f"{type(error).__name__}: {error}")


def begin(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    world: World,
    group: dist.ProcessGroup | None,
    rollouts: dict[str, Any] | None,
) -> Callable[[], Path]:
    """checkpoint.save in two parts: the state is copied to the CPU, and a thread begins to write.

    Args: as of checkpoint.save, and
        group: of all ranks, on the CPU, for what the writing threads tell each other; nobody else
            may use it. None in one process.
    Returns: the second part, for another thread: wait for the files, give them their name.
    Raises: OSError, as the second part does.
    """
    with checkpoint.writing(folder, step) as work:
        world.on_main(lambda: checkpoint.clean(folder))
        warnings.filterwarnings("ignore", message=checkpoint.ONE_PROCESS)  # from another thread
        written = dcp.async_save(
            checkpoint.whole_state(model, optimizer),
            checkpoint_id=work,
            process_group=group,
            no_dist=not world.launched,
        )
    assert isinstance(written, Future)

    def finish() -> Path:
        with checkpoint.writing(folder, step) as work:
            written.result()
            if world.main:  # which has heard of all ranks that they are done
                checkpoint.publish(work, step, config, rollouts)
        return checkpoint.folder_of(folder, step)

    return finish
