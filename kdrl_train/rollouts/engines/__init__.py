"""Opens the engine that samples completions, and checks that it samples from the trained policy."""

from typing import Any, Protocol

from kdrl_train.batch import Rollouts
from kdrl_train.config import TrainConfig
from kdrl_train.errors import EngineError
from kdrl_train.model.policy import Policy
from kdrl_train.ranks import World
from kdrl_train.rollouts.engines.continuous import ContinuousEngine
from kdrl_train.rollouts.engines.generate import GenerateEngine
from kdrl_train.rollouts.engines.vllm import VllmEngine
from kdrl_train.rollouts.engines.vllm_server import VllmServerEngine
from kdrl_train.rollouts.sampler import SampleRequest
from kdrl_train.waiting import Poll


class Engine(Protocol):
    """Samples the completions of a rank's prompts."""

    version: int
    """Number of optimiser steps that made the weights it samples from."""

    def generate(self, request: SampleRequest, poll: Poll | None = None) -> Rollouts:
        """Sample the completions of a request, with the log-probabilities they were sampled at.

        Args:
            poll: called regularly; an exception it raises stops sampling.
        """

    def load(self, policy: Policy, version: int) -> None:
        """Take over the policy's weights after `version` optimiser steps.

        All ranks call it together.
        """

    def close(self) -> None:
        """Let go of what the engine holds outside of this process."""


def open_engine(config: TrainConfig, policy: Policy, tokenizer: Any, world: World) -> Engine:
    """Make the engine of a run; the caller then loads the policy's weights into it."""
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


def require_agreement(mismatch: float | None, allowed: float, step: int) -> None:
    """Raise EngineError where trainer and engine disagree about the step's fresh samples.

    Args:
        mismatch: mean |log p(trainer) - log p(engine)| in nats per token; None: there is no token.
        allowed: the largest mean that is accepted, in nats (EngineConfig.allowed_mismatch).
    """
    if mismatch is not None and not mismatch <= allowed:
        raise EngineError(
            "the engine's log-probabilities must be within engine.max_sampler_mismatch = "
            f"{allowed:g} nats of the trainer's, on average over the tokens of step {step + 1}, "
            f"got {mismatch:.2g}: it samples from other weights (a tied LM head that was not "
            "loaded, a skipped push) or computes them in another way (rotary factors that follow "
            "the longest sequence of a batch, a top-k of keys that breaks ties by its place, code "
            "that lets the prompts of a batch change each other: set sampling.batch_size to 1); "
            "the run stops before the optimiser step"
        )
