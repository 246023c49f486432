"""What both vLLM engines share: one seeded request for each completion, every reply checked."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdrl_train.batch import Rollouts
from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.errors import EngineError
from kdrl_train.model.eos import eos_ids
from kdrl_train.model.policy import Policy
from kdrl_train.model.teacher.client import FORBIDDEN, ROUNDING


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to draw."""

    prompt_ids: list[int]
    params: dict[str, Any]
    """Sampling parameters, by the names that vLLM and its server have in common."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One completion."""

    ids: list[int]
    """T tokens, the one that ended it included."""
    logprobs: list[float]
    """T, nats, at the sampling temperature."""


class RequestEngine(ABC):
    """An engine that asks for each completion on its own, with a seed of its own.

    A completion is a function of (seed, step, prompt, place in the group), of prompt and weights,
    but for rounding in another batch. It is not the one that `generate` draws.

    Args:
        policy: gives the tokens that end a completion, and the columns that may be drawn.
    """

    def __init__(self, policy: Policy, tokenizer: Any) -> None:
        self.version = 0
        self.tokenizer = tokenizer
        self.stops = eos_ids(policy.model, tokenizer)
        self.allowed: list[int] | None = None
        if policy.sampled_vocab_size is not None and policy.sampled_vocab_size < policy.vocab_size:
            self.allowed = list(range(policy.sampled_vocab_size))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seed: int,
        step: int,
        first: int = 0,
        poll: Callable[[], None] | None = None,
    ) -> Rollouts:
        """See Engine. Raises: EngineError for an reply that is none to its request."""
        requests = [
            Request(list(prompt), self._params(sampling, [seed, step, first + p, g]))
            for p, prompt in enumerate(prompts)
            for g in range(sampling.group_size)
        ]
        replies = self.replies(requests, sampling, poll or _go_on)
        for r, reply in enumerate(replies):
            problem = self._problem(reply, sampling.max_new_tokens)
            if problem is not None:
                raise EngineError(
                    f"vLLM must answer each request with its tokens and their log-probabilities, "
                    f"got {problem} for completion {r} of step {step + 1}: see its log and options"
                )
        return Rollouts(
            prompt_ids=[torch.tensor(request.prompt_ids) for request in requests],
            completion_ids=[torch.tensor(reply.ids) for reply in replies],
            logprobs=[torch.tensor(reply.logprobs, dtype=torch.float32) for reply in replies],
            truncated=torch.tensor(
                [reply.ids[-1] not in self.stops for reply in replies], dtype=torch.bool
            ),
            texts=[self.tokenizer.decode(a.ids, skip_special_tokens=True) for a in replies],
        )

    @abstractmethod
    def replies(
        self, requests: list[Request], sampling: SamplingConfig, poll: Callable[[], None]
    ) -> list[Reply]:
        """One for each request, in their order. poll: called now and then; may raise."""

    def _params(self, sampling: SamplingConfig, entropy: list[int]) -> dict[str, Any]:
        """Every parameter is named: what is left out, a server takes from generation_config."""
        (state,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        return {
            "temperature": sampling.temperature,
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

    def _problem(self, reply: Reply, longest: int) -> str | None:
        """What is wrong with an reply; None: nothing."""
        ids, ends = reply.ids, [token in self.stops for token in reply.ids]
        if not ids or len(ids) != len(reply.logprobs):
            return f"{len(ids)} tokens and {len(reply.logprobs)} log-probabilities"
        if any(ends[:-1]) or not (ends[-1] or len(ids) == longest) or len(ids) > longest:
            return f"{len(ids)} tokens of {longest}, ending with {ids[-1]}, not with {self.stops}"
        for token, logprob in zip(ids, reply.logprobs, strict=True):
            if not FORBIDDEN < logprob < ROUNDING:
                return f"log-probability {logprob:g} of token {token}"
        return None


def _go_on() -> None:
    """Polls nothing."""


def longest_sequence(config: TrainConfig, policy: Policy) -> int:
    """Tokens of the longest prompt that the run may have, with its completion."""
    prompt = max(config.data.max_prompt_tokens, config.eval.data.max_prompt_tokens)
    window = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    asked = prompt + config.sampling.max_new_tokens
    return asked if window is None else min(window, asked)
