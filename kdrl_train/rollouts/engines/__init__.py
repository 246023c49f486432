"""Rollout engines: who samples, and how the trainer's weights reach them."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kdrl_train.batch import Rollouts
from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.errors import EngineError
from kdrl_train.model.policy import Policy
from kdrl_train.ranks import World
from kdrl_train.rollouts.engines.continuous import ContinuousEngine
from kdrl_train.rollouts.engines.generate import GenerateEngine
from kdrl_train.rollouts.engines.vllm import VllmEngine
from kdrl_train.rollouts.engines.vllm_server import VllmServerEngine


class Engine(Protocol):
    """What samples completions of a rank's prompts."""

    version: int
    """Optimiser steps behind the weights that it samples from."""

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
        """G completions of each prompt, with the log-probabilities they were sampled at.

        Args:
            first: place of the first prompt in the step.
            poll: called now and then; what it raises ends the generation.
        """

    def load(self, policy: Policy, version: int) -> None:
        """Take over the policy's weights after `version` steps. All ranks call it together."""


def open_engine(config: TrainConfig, policy: Policy, tokenizer: Any, world: World) -> Engine:
    """The engine of a run, with the policy's weights of step 0."""
    if config.engine.kind == "continuous":
        return ContinuousEngine(config, policy, tokenizer)
    if config.engine.kind == "vllm":
        return VllmEngine(config, policy, tokenizer, launched=world.launched)
    if config.engine.kind == "vllm_server":
        return VllmServerEngine(config, policy, tokenizer, world)
    shared = not world.launched and not config.engine.staleness
    return GenerateEngine(config, policy, tokenizer, shared=shared)


def require_version(engine: Engine, step: int) -> None:
    """Raise EngineError unless the engine holds the weights after `step` optimiser steps."""
    if engine.version != step:
        raise EngineError(
            f"rollouts of step {step + 1} must come from the weights after {step} steps, got those "
            f"after {engine.version}: the push of weights to the engine was skipped"
        )


def require_agreement(gap: float | None, limit: float, step: int) -> None:
    """Raise EngineError where trainer and engine disagree about the step's fresh samples.

    Args:
        gap: mean |log p(trainer) - log p(engine)| in nats per token; None: no token.
        limit: of engine.max_sampler_mismatch.
    """
    if gap is not None and not gap <= limit:
        raise EngineError(
            "the engine's log-probabilities must be within engine.max_sampler_mismatch = "
            f"{limit:g} nats of the trainer's, on average over the tokens of step {step + 1}, got "
            f"{gap:.2g}: it samples "
            "from other weights (a tied LM head that was not loaded, a skipped push) or computes "
            "them in another way; stopped before the optimiser step"
        )
