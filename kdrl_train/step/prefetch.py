"""Rollouts one step prefetch: those of the next step are drawn in a thread while this one trains.

The completions of step s, from 0, come from the weights after max(s - 1, 0) optimiser steps. The
thread does a rank's own part, without a collective: sampling, verification, and a teacher's server
where it may be asked early. The main thread waits for it before the step's first update, so that

- a signal or an error drops the step at hand whole, whose own completions are still there to be
  saved: a resumed run goes on to the bit;
- the trainer still holds the weights that sampled: `settle` compares like with like, some of the
  new completions with its own log-probabilities. A gap measured in the step that learns from them
  would have the update between the two in it.

What that step makes of them is in terms.py.
"""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from kdrl_train.batch import Batch, JudgedRollouts, Rollouts, Verdicts
from kdrl_train.method.metrics import token_means
from kdrl_train.model.fsdp import reshard
from kdrl_train.model.packing import pack
from kdrl_train.runfolder import checkpoint
from kdrl_train.runfolder.log import Stages
from kdrl_train.runfolder.signals import Stopped
from kdrl_train.step.collect import draw, gather
from kdrl_train.step.run import Run
from kdrl_train.step.score import score_packs

PROBED = 16
"""Completions whose log-probabilities `settle` compares, each of another prompt."""
GAPS = ("sampler_mismatch_mean", "sampler_mismatch_max")


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's completions, of all ranks."""

    found: JudgedRollouts
    version: int
    """Optimiser steps behind the weights that sampled them."""


class Prefetch:
    """What is drawn for the next step, and what was drawn for this one. Use one for a run."""

    def __init__(self) -> None:
        self.drawn: dict[int, Drawn] = {}
        """By step: of the step at hand and, once settled, of the next."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._closed = threading.Event()
        self._future: Future[JudgedRollouts] | None = None
        self._stages = Stages()

    def start(self, run: Run, step: int) -> None:
        """Draw the next step's completions from the engine's weights, in the thread; after the last
        step none."""
        self.drawn = {known: drawn for known, drawn in self.drawn.items() if known >= step}
        self._stages = Stages()
        if step + 1 < run.config.steps:
            self._future = self._pool.submit(self._draw, run, step + 1, self._stages)

    def settle(
        self, run: Run, batch: Batch, own: Mapping[str, float | None], step: int, stages: Stages
    ) -> dict[str, float | None]:
        """Wait for the completions of the next step, before the first update of this one. All ranks
        call it together.

        Args:
            batch: this step's.
            own: gap metrics over its tokens; with a staleness, one update is in them.
        Returns: sampler_mismatch_mean and sampler_mismatch_max without any update in between: of
            some of the new completions; in the last step of its own ones, or None if these are
            stale. And staleness, stale_sampler_mismatch_mean, seconds_prefetch (in the thread).
        Raises: what the thread raised, RankError where that was on another rank; Stopped.
        """
        gaps = {name: None if batch.staleness else own[name] for name in GAPS}
        if self._future is not None:
            version = run.engine.version
            with stages("rollout"):
                self._future.exception()  # waits; gather raises it
            found = gather(run, self._future.result, stages)
            self.drawn[step + 1] = Drawn(found, version)
            self._future = None
            with stages("score"):
                gaps = measured_mismatch(run, found.rollouts)
        return {
            **gaps,
            "staleness": batch.staleness,
            "stale_sampler_mismatch_mean": own["sampler_mismatch_mean"]
            if batch.staleness
            else None,
            "seconds_prefetch": sum(self._stages.seconds.values()),
        }

    def state(self, run: Run, step: int) -> dict[str, Any] | None:
        """What a checkpoint after `step` optimiser steps holds of them, if there are any.

        None also where the reward function failed on a whole group, which ends the run: resumed
        with a better one it must draw and judge again.
        """
        if step not in self.drawn:
            return None
        drawn, size = self.drawn[step], run.config.sampling.group_size
        if torch.tensor(drawn.found.verdicts.rewards).view(-1, size).isnan().all(dim=1).any():
            return None
        rollouts = drawn.found.rollouts
        return {
            "step": step,
            "version": drawn.version,
            "rollouts": {field.name: getattr(rollouts, field.name) for field in fields(rollouts)},
            "verdicts": asdict(drawn.found.verdicts),
            "teacher_logprobs": drawn.found.teacher_logprobs,
        }

    def restore(self, folder: Path) -> None:
        """Take up what a checkpoint holds of them; without any, the next step is on-policy.

        Raises: ValueError for a damaged file.
        """
        path = folder / checkpoint.ROLLOUTS
        if not path.exists():
            return
        try:
            state = torch.load(path)
            found = JudgedRollouts(
                rollouts=Rollouts(**state["rollouts"]),
                verdicts=Verdicts(**state["verdicts"]),
                teacher_logprobs=state["teacher_logprobs"],
            )
            self.drawn[state["step"]] = Drawn(found, state["version"])
        except Exception as error:  # torch.load has many
            raise ValueError(
                f"{path} must hold the rollouts of the next step, got {error!r}: delete {folder} "
                "to resume from the one before"
            ) from error

    def close(self) -> None:
        """Drop what is being drawn, and wait until it is. May be called twice."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def _draw(self, run: Run, step: int, stages: Stages) -> JudgedRollouts:
        def poll() -> None:
            run.interrupt.poll()
            if self._closed.is_set():
                raise Stopped

        with _own_stream(run.policy.device):
            return draw(run, step, stages, poll)


def measured_mismatch(run: Run, rollouts: Rollouts) -> dict[str, float | None]:
    """GAPS over the first completions of PROBED prompts, or of one for each rank if these are more,
    at the trainer's present weights: a forward pass. All ranks call it together.

    They are spread over the step: each rank has drawn a part of it, with an engine of its own.
    """
    size, prompts = run.config.sampling.group_size, run.config.sampling.prompts_per_step
    count = min(max(PROBED, run.world.size), prompts)
    places = [size * (i * prompts // count) for i in range(count)]
    some = Rollouts(
        prompt_ids=[rollouts.prompt_ids[r] for r in places],
        completion_ids=[rollouts.completion_ids[r] for r in places],
        logprobs=[rollouts.logprobs[r] for r in places],
        truncated=rollouts.truncated[places],
        texts=[rollouts.texts[r] for r in places],
    )
    nothing = torch.zeros(len(places))
    rows = pack(
        some,
        advantages_R=nothing,
        weights_R=torch.ones(len(places)),
        kd_weight_R=nothing,
        micro_batch_tokens=run.config.optim.micro_batch_tokens,
        rank=run.world.rank,
        ranks=run.world.size,
    )
    own = score_packs(run.policy, None, rows).sums
    reshard(run.policy)
    means = token_means(run.world.sum(own, largest=("sampler_mismatch_max",)))
    return {name: means[name] for name in GAPS}


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, kernels of this thread run beside the trainer's, once the weights are pushed."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()
