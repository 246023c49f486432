"""Scores the sequences of many clients by one model, in batches of a limited number of tokens."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train.model.packing import feed
from kdrl_train.model.policy import HeadedModel

Arrays = dict[str, Tensor]
"""What a job gets by name, each [T, ...] on the CPU."""
MOST_IDS = 512
"""Most token ids of one place, as kk.linear_logprobs takes them."""


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
    states: bool = False
    """The result is the last hidden states, and no log-probabilities."""
    topk: int = 0
    """K of the likeliest tokens at each place; 0: none."""
    extra_tokens: Tensor | None = None
    """[T, K] int64 in [0, vocab_size): other tokens to score at each place."""
    result: Future[Tensor | Arrays] = field(default_factory=Future)
    """On the CPU: log-probabilities [T] float32, nats; or what score_tokens, final_states say."""

    @property
    def tokens(self) -> int:
        """Counts the tokens that the model reads."""
        return len(self.prompt_ids) + len(self.completion_ids) - 1

    @property
    def kind(self) -> tuple[bool, int, int, int]:
        """Tells which jobs can share a forward pass: those of one kind."""
        if self.states:
            return True, 0, 0, 0
        extra = 0 if self.extra_tokens is None else self.extra_tokens.shape[1]
        return False, self.vocab_size, self.topk, extra


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
                job.result.cancel()
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
                if batch and (tokens > self.batch_tokens or job.kind != batch[0].kind):
                    break
                batch.append(job)
            for job in batch:
                del self._waiting[job]
            return [job for job in batch if job.result.set_running_or_notify_cancel()]

    def _work(self, batch: list[Job]) -> None:
        if not batch:  # all were cancelled, as the server is stopping
            return
        try:
            results = compute(self.model, batch)
        except Exception as error:  # torch may raise anything: clients get it, the server goes on
            for job in batch:
                job.result.set_exception(error)
            return
        for job, result in zip(batch, results, strict=True):
            job.result.set_result(result)


def compute(model: HeadedModel, jobs: list[Job]) -> Sequence[Tensor | Arrays]:
    """Computes the results of jobs of one kind in one forward pass; model: at temperature 1."""
    first = jobs[0]
    if first.states:
        return final_states(model, jobs)
    if first.topk or first.extra_tokens is not None:
        return score_tokens(model, jobs)
    return score_packed(model, jobs)


@torch.no_grad()
def score_packed(model: HeadedModel, jobs: list[Job]) -> list[Tensor]:
    """Scores the tokens of jobs: [T] float32 nats on the CPU for each job."""
    out = _linear_logprobs(model, jobs, _hidden(model, jobs))
    return list(out.logprobs.float().cpu().split(_lengths(jobs)))


@torch.no_grad()
def score_tokens(model: HeadedModel, jobs: list[Job]) -> list[Arrays]:
    """Scores the tokens of jobs, and others at their places.

    Returns: for each job logprobs [T]; with job.topk topk_ids [T, K] int32, -1 where fewer than K
        tokens have a probability above 0, and topk_logprobs [T, K], there 0; with job.extra_tokens
        extra_logprobs [T, K]. Log-probabilities are float32, nats, on the CPU.
    """
    hidden, first = _hidden(model, jobs), jobs[0]
    arrays: Arrays = {}
    if first.topk:
        out = _linear_logprobs(model, jobs, hidden, topk=first.topk)
        assert out.topk_tokens is not None
        assert out.topk_logprobs is not None
        arrays |= {"topk_ids": out.topk_tokens.int(), "topk_logprobs": out.topk_logprobs}
        arrays["logprobs"] = out.logprobs
    if first.extra_tokens is not None:
        extra = torch.cat([job.extra_tokens for job in jobs if job.extra_tokens is not None])
        out = _linear_logprobs(model, jobs, hidden, extra_tokens=extra.to(hidden.device))
        assert out.extra_logprobs is not None
        arrays |= {"extra_logprobs": out.extra_logprobs, "logprobs": out.logprobs}
    return _per_job(arrays, jobs)


@torch.no_grad()
def final_states(model: HeadedModel, jobs: list[Job]) -> list[Arrays]:
    """Computes what the model's head reads: states [T, H] after the final norm, at the places that
    predict the tokens of each completion, in the model's dtype, on the CPU."""
    return _per_job({"states": _hidden(model, jobs)}, jobs)


def _lengths(jobs: list[Job]) -> list[int]:
    return [len(job.completion_ids) for job in jobs]


def _per_job(arrays: Arrays, jobs: list[Job]) -> list[Arrays]:
    """Splits arrays of all loss tokens [N, ...] into those of each job, on the CPU."""
    parts = {name: array.cpu().split(_lengths(jobs)) for name, array in arrays.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _hidden(model: HeadedModel, jobs: list[Job]) -> Tensor:
    """Runs the model over a pack of jobs: the states [N, H] that predict their completions."""
    packed = feed([job.prompt_ids for job in jobs], [job.completion_ids for job in jobs])
    ids, positions, places = (tensor.to(model.model.device) for tensor in packed)
    return model.hidden(ids, positions, places, [job.tokens for job in jobs])


def _linear_logprobs(
    model: HeadedModel, jobs: list[Job], hidden: Tensor, **more: Any
) -> kk.LogprobOutput:
    """Scores jobs of one vocab_size from their states, each at its own temperature."""
    vocab_size, device = jobs[0].vocab_size, hidden.device
    weight, bias = model.head()
    temperature = torch.tensor([job.temperature * model.temperature for job in jobs])
    return kk.linear_logprobs(
        hidden,
        weight[:vocab_size],
        torch.cat([job.completion_ids for job in jobs]).to(device),
        bias=None if bias is None else bias[:vocab_size],
        temperature=temperature.repeat_interleave(torch.tensor(_lengths(jobs))).to(device),
        softcap=model.softcap,
        **more,
    )


@dataclass(slots=True)
class ServedTeacher:
    """Holds the model that the server scores with; both fields are None until it is loaded."""

    scorer: Scorer | None = None
    info: dict[str, Any] | None = None
    """The reply to /version."""
