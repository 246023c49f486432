"""Draws the rollouts of the next step in a thread while this one trains (engine.staleness 1).

The completions of step s, from 0, come from the weights after max(s - 1, 0) optimiser steps. The
thread does the work of this rank, without a collective: it samples, verifies, and queries a
teacher's server where that does not depend on the step before. The main thread waits for it before
the step's first update, so that

- a signal or an error discards the whole current step. Its completions are saved with the
  checkpoint, so a resumed run gives the same bits;
- the trainer still holds the weights that sampled: score.probe_mismatch compares like with like,
  some of the new completions with its own log-probabilities. A mismatch measured in the step that
  learns from them would contain the update between the two.

What that step makes of them is in coefficients.py.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from kdrl_train.batch import JudgedRollouts, Rollouts, TeacherReply, Verdicts
from kdrl_train.runfolder import checkpoint
from kdrl_train.runfolder.log import Stages
from kdrl_train.runfolder.signals import Stopped
from kdrl_train.runfolder.untrusted import load_tensors

Draw = Callable[[Stages, Callable[[], None]], JudgedRollouts]
"""Draws a rank's part of a step. Its second argument is called regularly; an exception that it
raises stops the drawing."""
Gather = Callable[[Callable[[], JudgedRollouts], Stages], JudgedRollouts]
"""Joins the parts of all ranks, see Run.gather."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's completions, of all ranks."""

    judged: JudgedRollouts
    version: int
    """Optimiser steps behind the weights that sampled them."""


class Prefetch:
    """Holds what is drawn for the next step, and what was drawn for this one. Use one for a run.

    Args:
        device: of the models; on a GPU the thread has a stream of its own.
        poll: called regularly by the thread; an exception that it raises stops the drawing.
    """

    def __init__(self, device: torch.device, poll: Callable[[], None]) -> None:
        self.drawn: dict[int, Drawn] = {}
        """By step: of the step at hand and, once received, of the next."""
        self._device = device
        self._poll = poll
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._closed = threading.Event()
        self._pending: tuple[int, int, Future[JudgedRollouts]] | None = None
        self._stages = Stages()

    def start(self, step: int, version: int, draw: Draw) -> None:
        """Begin to draw the completions of `step` in the thread.

        version: optimiser steps behind the weights that the engine has now.
        """
        self._stages = Stages()
        self._pending = step, version, self._pool.submit(self._draw, draw, self._stages)

    def receive(self, gather: Gather, stages: Stages) -> JudgedRollouts | None:
        """Wait for the completions of the next step and keep them, joined over all ranks. All ranks
        call it together.

        Returns: the completions; None where none are being drawn.
        Raises: what the thread raised, RankError where that was on another rank; Stopped.
        """
        if self._pending is None:
            return None
        step, version, future = self._pending
        with stages("rollout"):
            future.exception()  # waits; gather raises it
        judged = gather(future.result, stages)
        self.drawn = {known: drawn for known, drawn in self.drawn.items() if known >= step - 1}
        self.drawn[step] = Drawn(judged, version)
        self._pending = None
        return judged

    @property
    def seconds(self) -> float:
        """Seconds that the thread took for the completions drawn last."""
        self._stages.settle()
        return sum(self._stages.seconds.values())

    def state(self, step: int, group_size: int) -> dict[str, Any] | None:
        """Return what a checkpoint after `step` optimiser steps stores of them, if there are any.

        None also where the reward function failed on a whole group, which ends the run: resumed
        with a better one it must draw and judge again.
        """
        if step not in self.drawn:
            return None
        drawn = self.drawn[step]
        judged = drawn.judged
        if torch.tensor(judged.verdicts.rewards).view(-1, group_size).isnan().all(dim=1).any():
            return None
        rollouts = judged.rollouts
        return {
            "step": step,
            "version": drawn.version,
            "rollouts": {field.name: getattr(rollouts, field.name) for field in fields(rollouts)},
            "verdicts": asdict(judged.verdicts),
            "teacher_logprobs": [_kept(reply) for reply in judged.teacher_replies],
        }

    def restore(self, folder: Path) -> None:
        """Read what a checkpoint stores of them; without any, the next step is on-policy.

        Raises: ValueError for a damaged file.
        """
        path = folder / checkpoint.ROLLOUTS
        if not path.exists():
            return
        try:
            state = load_tensors(path)
            judged = JudgedRollouts(
                rollouts=Rollouts(**state["rollouts"]),
                verdicts=Verdicts(**state["verdicts"]),
                teacher_replies=state["teacher_logprobs"],
            )
            self.drawn[state["step"]] = Drawn(judged, state["version"])
        except Exception as error:  # a damaged file raises many types
            raise ValueError(
                f"{path} must hold the rollouts of the next step, got {error!r}: delete {folder} "
                "to resume from the one before"
            ) from error

    def close(self) -> None:
        """Stop the drawing and wait until it has stopped. May be called twice."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def _draw(self, draw: Draw, stages: Stages) -> JudgedRollouts:
        def poll() -> None:
            self._poll()
            if self._closed.is_set():
                raise Stopped

        with _side_stream(self._device):
            return draw(stages, poll)


def _kept(reply: TeacherReply | None) -> torch.Tensor | None:
    """Return what a checkpoint stores of a server's reply: log-probabilities. States would make it
    as large as the models; a resumed run asks for them again."""
    return reply if isinstance(reply, torch.Tensor) and reply.ndim == 1 else None


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Run the kernels of this thread beside the trainer's, once the weights are pushed."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()
