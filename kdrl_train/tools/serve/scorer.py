"""Scores the sequences of many clients by one model, in batches of a limited number of tokens."""

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train.model.packing import feed
from kdrl_train.model.policy import HeadedModel


@dataclass(frozen=True, slots=True, eq=False)
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
        self._waiting: OrderedDict[Job, None] = OrderedDict()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="scorer", daemon=True).start()

    def submit(self, jobs: list[Job]) -> bool:
        """Accepts all jobs, or none and returns False if they do not fit the queue."""
        with self._changed:
            if len(self._waiting) + len(jobs) > self.queue_size:
                return False
            self._waiting.update(dict.fromkeys(jobs))
            self._changed.notify()
        return True

    def withdraw(self, jobs: list[Job]) -> None:
        """Cancels those of the jobs that still wait, which leave their places to others."""
        with self._changed:
            for job in jobs:
                job.logprobs.cancel()
                self._waiting.pop(job, None)

    def _run(self) -> None:
        device = self.model.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its current device
        while True:
            self._work(self._next_batch())

    def _next_batch(self) -> list[Job]:
        """Waits for a job; takes it, and those that came after it up to batch_tokens."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            batch: list[Job] = []
            tokens = 0
            for job in self._waiting:
                tokens += job.tokens
                if batch and (tokens > self.batch_tokens or job.vocab_size != batch[0].vocab_size):
                    break
                batch.append(job)
            for job in batch:
                del self._waiting[job]
            return [job for job in batch if job.logprobs.set_running_or_notify_cancel()]

    def _work(self, batch: list[Job]) -> None:
        if not batch:  # all were cancelled, as the server is stopping
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
