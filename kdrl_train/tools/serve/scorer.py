"""Scores the sequences of many clients by one model, in batches of a limited number of tokens."""

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
    """Is one sequence to score."""

    prompt_ids: Tensor
    """[T] int64, at least one."""
    completion_ids: Tensor
    """[T] int64, at least one, in [0, vocab_size)."""
    temperature: float
    vocab_size: int
    """The softmax is taken over the first vocab_size tokens."""
    logprobs: Future[Tensor] = field(default_factory=Future)
    """The result: [T] float32, nats, on the CPU."""

    @property
    def tokens(self) -> int:
        """Counts the tokens that the model reads."""
        return len(self.prompt_ids) + len(self.completion_ids) - 1


class Scorer:
    """Runs a model in one thread, on jobs in the order in which they came.

    Args:
        model: at temperature 1.
        batch_tokens: most tokens of one forward pass; a longer job has a pass alone.
        queue_size: jobs that may wait.
    """

    def __init__(self, model: HeadedModel, batch_tokens: int, queue_size: int) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.queue_size = queue_size
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="scorer", daemon=True).start()

    def submit(self, jobs: list[Job]) -> bool:
        """Accepts all jobs, or none and returns False if they do not fit the queue.

        Only one thread may call it.
        """
        if self._queue.qsize() + len(jobs) > self.queue_size:
            return False
        for job in jobs:
            self._queue.put(job)
        return True

    def _run(self) -> None:
        device = self.model.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its current device
        next_job: Job | None = None
        while True:
            batch = [next_job or self._queue.get()]
            next_job = self._fill(batch)
            self._work(batch)

    def _fill(self, batch: list[Job]) -> Job | None:
        """Adds waiting jobs up to batch_tokens; returns the first job that did not fit, if any."""
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
        if not batch:  # all clients have left
            return
        try:
            scores = score_packed(self.model, batch)
        except Exception as error:  # torch may raise anything: clients get it, the server goes on
            for job in batch:
                job.logprobs.set_exception(error)
            return
        for job, logprobs in zip(batch, scores, strict=True):
            job.logprobs.set_result(logprobs)


@torch.no_grad()
def score_packed(model: HeadedModel, jobs: list[Job]) -> list[Tensor]:
    """Scores jobs in one forward pass over a pack: [T] float32 nats on the CPU for each job.

    Args:
        model: at temperature 1.
        jobs: all with the same vocab_size.
    """
    device, vocab_size = model.model.device, jobs[0].vocab_size
    packed = feed([job.prompt_ids for job in jobs], [job.completion_ids for job in jobs])
    ids, positions, places = (tensor.to(device) for tensor in packed)
    hidden = model.hidden(ids, positions, places, [job.tokens for job in jobs])
    weight, bias = model.head()
    lengths = [len(job.completion_ids) for job in jobs]
    temperature = torch.tensor([job.temperature * model.temperature for job in jobs])
    out = kk.linear_logprobs(
        hidden,
        weight[:vocab_size],
        torch.cat([job.completion_ids for job in jobs]).to(device),
        bias=None if bias is None else bias[:vocab_size],
        temperature=temperature.repeat_interleave(torch.tensor(lengths)).to(device),
        softcap=model.softcap,
    )
    return list(out.logprobs.float().cpu().split(lengths))


@dataclass(slots=True)
class ServedTeacher:
    """Holds the model that the server scores with; both fields are None until it is loaded."""

    scorer: Scorer | None = None
    info: dict[str, Any] | None = None
    """The reply to /version."""
