"""Holds what both vLLM engines share: a seeded request for each completion, each reply checked."""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdrl_train.batch import Rollouts
from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.errors import EngineError
from kdrl_train.model.eos import eos_ids
from kdrl_train.model.policy import Policy
from kdrl_train.model.teacher.replies import logprob_problem
from kdrl_train.model.window import window
from kdrl_train.rollouts.rendering import completion_text
from kdrl_train.rollouts.sampler import SampleRequest
from kdrl_train.waiting import Poll


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """Describes one completion to sample by vLLM."""

    prompt_ids: list[int]
    params: dict[str, Any]
    """Sampling parameters, by the names that vLLM and its server have in common."""


@dataclass(frozen=True, slots=True)
class CompletionReply:
    """Holds the completion that vLLM returned for one request."""

    ids: list[int]
    """T tokens, with the one that ended the completion."""
    logprobs: list[float]
    """T log-probabilities at the sampling temperature, in nats."""


class RequestEngine(ABC):
    """An Engine that sends a request of its own, with a seed of its own, for each completion.

    A completion is a function of (seed, step, prompt, place in the group), of the prompt's text and
    the weights, except where rounding in another batch changes a token. It is not the completion
    that `generate` draws.

    Args:
        policy: gives the tokens that end a completion, and the columns that may be drawn.
    """

    def __init__(self, policy: Policy, tokenizer: Any) -> None:
        self.version = 0
        self.tokenizer = tokenizer
        self.stops = eos_ids(policy.model, tokenizer)
        self.columns = min(policy.sampled_vocab_size or policy.vocab_size, policy.vocab_size)
        self.allowed = list(range(self.columns)) if self.columns < policy.vocab_size else None

    def generate(self, request: SampleRequest, poll: Poll | None = None) -> Rollouts:
        """Sample as Engine says. Raises: EngineError for a reply that does not fit its request."""
        sampling = request.sampling
        repeated = [list(prompt) for prompt in request.prompts for _ in range(sampling.group_size)]
        requests = [
            CompletionRequest(
                prompt, self._params(sampling, request.entropy(r), greedy=request.greedy)
            )
            for r, prompt in enumerate(repeated)
        ]
        report = request.report or _no_report
        replies = self.replies(requests, sampling, poll or no_poll, report)
        for r, reply in enumerate(replies):
            problem = self._problem(reply, sampling.max_new_tokens)
            if problem is not None:
                raise EngineError(
                    f"vLLM must return the tokens of each completion with their log-probabilities, "
                    f"got {problem} for completion {r} of step {request.step + 1}: see vLLM's log "
                    "and options"
                )
        truncated = [reply.ids[-1] not in self.stops for reply in replies]
        return Rollouts(
            prompt_ids=[torch.tensor(one.prompt_ids) for one in requests],
            completion_ids=[torch.tensor(reply.ids) for reply in replies],
            logprobs=[torch.tensor(reply.logprobs, dtype=torch.float32) for reply in replies],
            truncated=torch.tensor(truncated, dtype=torch.bool),
            texts=[
                completion_text(self.tokenizer, reply.ids, cut)
                for reply, cut in zip(replies, truncated, strict=True)
            ],
        )

    @abstractmethod
    def replies(
        self,
        requests: list[CompletionRequest],
        sampling: SamplingConfig,
        poll: Poll,
        report: Callable[[int, int], None],
    ) -> list[CompletionReply]:
        """Return one reply for each request, in their order; call poll regularly.

        report: called where more completions have ended, as SampleRequest has it.
        """

    def _params(
        self, sampling: SamplingConfig, entropy: tuple[int, ...], *, greedy: bool = False
    ) -> dict[str, Any]:
        """Name every parameter: a server takes those left out from generation_config.json."""
        (state,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        return {
            "temperature": 0.0 if greedy else sampling.temperature,  # 0: the most probable token
            "max_tokens": sampling.max_new_tokens,
            "seed": int(state >> np.uint64(1)),  # servers take int64
            "stop_token_ids": self.stops,
            "allowed_token_ids": self.allowed,
            "logprobs": 0,  # of the drawn token, and of no other
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def _problem(self, reply: CompletionReply, max_new_tokens: int) -> str | None:
        """Say what is wrong with a reply; None: nothing is."""
        ids, size = reply.ids, self.columns
        for t, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < size:
                return f"{reprlib.repr(token)} in place of an id below {size:,} for token {t}"
        if not ids or len(ids) != len(reply.logprobs):
            return f"{len(ids)} tokens and {len(reply.logprobs)} log-probabilities"
        ends = [token in self.stops for token in ids]
        complete = ends[-1] or len(ids) == max_new_tokens
        if any(ends[:-1]) or not complete or len(ids) > max_new_tokens:
            return (
                f"{len(ids)} tokens of {max_new_tokens}, ending with {ids[-1]}, not with "
                f"{self.stops}"
            )
        problem = logprob_problem(reply.logprobs, ids)
        return None if problem is None else f"log-probability {problem}"


def no_poll() -> None:
    """Never stops sampling."""


def _no_report(_done: int, _tokens: int) -> None:
    """Shows nothing."""


def longest_sequence(config: TrainConfig, policy: Policy) -> int:
    """Return the tokens of the longest prompt that the run may have, with its completion."""
    held_out = config.eval.sampling(config.sampling).max_new_tokens
    lengths = [one.max_prompt_tokens + held_out for one in config.eval.sections.values()]
    longest = max([config.data.max_prompt_tokens + config.sampling.max_new_tokens, *lengths])
    return min(window(policy.model.config) or longest, longest)
