"""Log-probabilities of many clients' sequences by one model, batched to a token budget."""

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train.model.packing import feed
from kdrl_train.model.policy import HeadedModel


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to score."""

    prompt_ids: Tensor
    """[T] int64, at least one."""
    completion_ids: Tensor
    """[T] int64, at least one, in [0, vocab_size)."""
    temperature: float
    vocab_size: int
    """Columns of the head from here on are left out."""
    logprobs: Future[Tensor] = field(default_factory=Future)
    """[T] float32, nats, on the CPU."""

    @property
    def tokens(self) -> int:
        """Tokens that the model is fed."""
        return len(self.prompt_ids) + len(self.completion_ids) - 1


class Scorer:
    """A model and the one thread that runs it, on jobs in the order they came.

    Args:
        model: at temperature 1.
        batch_tokens: budget of one forward pass; a longer job has one of its own.
        queue_size: jobs that may wait.
    """

    def __init__(self, model: HeadedModel, batch_tokens: int, queue_size: int) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.queue_size = queue_size
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="scorer", daemon=True).start()

    def submit(self, jobs: list[Job]) -> bool:
        """Take all jobs, to be called by one thread; False, and none taken, if they do not fit."""
        if self._queue.qsize() + len(jobs) > self.queue_size:
            return False
        for job in jobs:
            self._queue.put(job)
        return True

    def _run(self) -> None:
        device = self.model.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread's own setting: kernels launch there
        held: Job | None = None
        while True:
            batch = [held or self._queue.get()]
            held = self._fill(batch)
            self._work(batch)

    def _fill(self, batch: list[Job]) -> Job | None:
        """Add what waits, up to the budget; returns the first job that did not fit, if any."""
        tokens = batch[0].tokens
        while not self._queue.empty():
            job = self._queue.get()
            if job.logprobs.cancelled():
                continue
            tokens += job.tokens
            if tokens > self.batch_tokens or job.vocab_size != batch[0].vocab_size:
                return job
            batch.append(job)
        return None

    def _work(self, batch: list[Job]) -> None:
        batch = [job for job in batch if job.logprobs.set_running_or_notify_cancel()]
        if not batch:  # nobody waits any more
            return
        try:
            found = score_packed(self.model, batch)
        except Exception as error:  # whatever torch raises goes to who asked; the server lives on
            for job in batch:
                job.logprobs.set_exception(error)
            return
        for job, logprobs in zip(batch, found, strict=True):
            job.logprobs.set_result(logprobs)


@torch.no_grad()
def score_packed(model: HeadedModel, jobs: list[Job]) -> list[Tensor]:
    """Log-probabilities [T] of each job, float32 nats on the CPU, from one packed forward pass.

    Args:
        model: at temperature 1.
        jobs: of one vocab_size.
    """
    device, limit = model.model.device, jobs[0].vocab_size
    row = feed([job.prompt_ids for job in jobs], [job.completion_ids for job in jobs])
    ids, positions, places = (tensor.to(device) for tensor in row)
    hidden = model.hidden(ids, positions, places, [job.tokens for job in jobs])
    weight, bias = model.head()
    lengths = [len(job.completion_ids) for job in jobs]
    temperature = torch.tensor([job.temperature * model.temperature for job in jobs])
    out = kk.linear_logprobs(
        hidden,
        weight[:limit],
        torch.cat([job.completion_ids for job in jobs]).to(device),
        bias=None if bias is None else bias[:limit],
        temperature=temperature.repeat_interleave(torch.tensor(lengths)).to(device),
        softcap=model.softcap,
    )
    return list(out.logprobs.float().cpu().split(lengths))


@dataclass(slots=True)
class Service:
    """What the end points answer from; both are None until the model is loaded."""

    scorer: Scorer | None = None
    info: dict[str, Any] | None = None
