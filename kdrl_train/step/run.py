"""Defines what a run holds on one rank, from its first step to its last."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kdrl_train.batch import Example, JudgedRollouts
from kdrl_train.config import TrainConfig
from kdrl_train.method.schedules import History
from kdrl_train.model.policy import Policy
from kdrl_train.model.teachers import Teachers
from kdrl_train.ranks import World
from kdrl_train.rollouts.engines import Engine
from kdrl_train.rollouts.problems import ProblemSet
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder.async_saver import Saver
from kdrl_train.runfolder.best import BestSoFar
from kdrl_train.runfolder.jsonl import Record
from kdrl_train.runfolder.log import RunLog, Stages
from kdrl_train.runfolder.signals import Interrupt, Stopped
from kdrl_train.step.prefetch import Prefetch


@dataclass(slots=True)
class Position:
    """Says which step the weights belong to: what can be saved when an error ends the run."""

    done: int
    """Whole steps behind the weights."""
    begun: bool = False
    """Whether an optimiser step of the step that follows has begun: the weights then belong to no
    whole step."""
    record: Record | None = None
    """Of the last whole step, until the log has it."""

    def finish(self, record: Record) -> None:
        """Count the step of a record as done."""
        self.done, self.begun, self.record = record["step"] + 1, False, record


@dataclass(frozen=True, slots=True)
class Run:
    """Holds everything that lasts longer than a step, on one rank."""

    config: TrainConfig
    world: World
    tokenizer: Any
    policy: Policy
    teachers: Teachers
    engine: Engine
    optimizer: torch.optim.Optimizer
    examples: list[Example]
    held_out: list[ProblemSet]
    verifier: Verifier
    interrupt: Interrupt
    history: History
    best: BestSoFar | None
    """With eval.keep_best."""
    log: RunLog
    saver: Saver
    prefetch: Prefetch | None
    """With engine.staleness 1."""
    position: Position

    def stop_if_signalled(self) -> None:
        """Raise Stopped on all ranks if a signal has come to one of them. All call it together."""
        if self.world.any(self.interrupt.requested):
            raise Stopped

    def waited(self, stages: Stages, since: float) -> None:
        """Count the time since then, of time.perf_counter, as waiting for the slowest rank."""
        if self.world.size > 1:
            stages.add("wait", since)

    def gather(self, make: Callable[[], JudgedRollouts], stages: Stages) -> JudgedRollouts:
        """Join make() of all ranks, in their order. All call it together.

        Raises: Stopped on all ranks where make raised it on one.
        """
        ended: list[float] = []

        def make_part() -> JudgedRollouts | None:
            try:
                return make()
            except Stopped:
                return None
            finally:
                ended.append(time.perf_counter())

        parts = self.world.share(make_part)
        self.waited(stages, ended[0])
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            raise Stopped
        return JudgedRollouts.join(whole)
