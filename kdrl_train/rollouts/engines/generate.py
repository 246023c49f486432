"""transformers `generate` as the engine: the policy's own model, or a copy of it on each rank."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from kdrl_train.batch import Rollouts
from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.model.fsdp import full_weights
from kdrl_train.model.load import load_model
from kdrl_train.model.policy import Policy
from kdrl_train.rollouts.sampler import generate_rollouts


class GenerateEngine:
    """Engine (see the package) in this process.

    Args:
        config: the run's.
        policy: whole where it is shared.
        shared: sample from the policy's own model: nothing is copied, but `generate` needs whole
            weights. Otherwise each rank keeps a whole copy in the compute dtype.
    """

    def __init__(
        self, config: TrainConfig, policy: Policy, tokenizer: Any, *, shared: bool
    ) -> None:
        self.version = 0
        self.tokenizer = tokenizer
        self.vocab_size = policy.sampled_vocab_size
        self.model = policy.model
        self.context: Callable[[], AbstractContextManager[Any]] = policy.autocast
        self.shared = shared
        if not shared:
            dtype = policy.compute_dtype
            self.model = load_model(config.model.policy, "model.policy", config.model, dtype)
            self.context = nullcontext

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
        """See Engine."""
        with self.context():
            return generate_rollouts(
                self.model,
                self.tokenizer,
                prompts,
                sampling,
                seed,
                step,
                self.vocab_size,
                first=first,
                poll=poll,
            )

    @torch.no_grad()
    def load(self, policy: Policy, version: int) -> None:
        """See Engine. Raises: RuntimeError where the two models have other weights."""
        if not self.shared:
            own = dict(self.model.named_parameters())
            for name, weight in full_weights(policy.model):
                own.pop(name).copy_(weight)
            if own:
                raise RuntimeError(f"every weight must be loaded, got none for {sorted(own)}")
        self.version = version
