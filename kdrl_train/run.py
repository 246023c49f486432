"""What a run holds, and what one step learns from."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdrl_train.config import TrainConfig
from kdrl_train.data import Example
from kdrl_train.distributed import World
from kdrl_train.engines import Engine
from kdrl_train.interrupt import Interrupt, Stopped
from kdrl_train.log import RunLog, Stages
from kdrl_train.policy import Policy, Teacher
from kdrl_train.rollout import Rollouts
from kdrl_train.saving import Saver
from kdrl_train.schedules import History
from kdrl_train.teachers import RemoteTeacher
from kdrl_train.verifier import Verdicts, Verifier

if TYPE_CHECKING:
    from kdrl_train.ahead import Ahead


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that lasts longer than a step, on one rank."""

    config: TrainConfig
    world: World
    tokenizer: Any
    policy: Policy
    teacher: Teacher | None
    remote: RemoteTeacher | None
    """The teacher, where it is behind a URL."""
    engine: Engine
    optimizer: torch.optim.Optimizer
    examples: list[Example]
    held_out: list[Example]
    verifier: Verifier
    interrupt: Interrupt
    history: History
    log: RunLog
    saver: Saver
    ahead: "Ahead | None"
    """With engine.staleness 1."""

    def stop_if_asked(self) -> None:
        """Raise Stopped on all ranks if a signal has come to one of them. All call it together."""
        if self.world.any(self.interrupt.requested):
            raise Stopped

    def waited(self, stages: Stages, since: float) -> None:
        """Count the time since then, of time.perf_counter, as waiting for the slowest rank."""
        if self.world.size > 1:
            stages.add("wait", since)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's completions with their rewards, of all ranks: what the update learns from."""

    examples: list[Example]
    """R, one per completion."""
    rollouts: Rollouts
    verdicts: Verdicts
    rewards: Tensor
    """rewards_PG [P, G] float64, NaN where the reward function failed."""
    teacher_logprobs: list[Tensor | None]
    """R of [T] nats, where a server was asked early; else None."""
    lag: int
    """Optimiser steps between the weights that sampled them and those that learn from them."""
