"""Samples with transformers `generate`, from the policy's own model or a copy on each rank."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from kdrl_train.batch import Rollouts
from kdrl_train.config import TrainConfig
from kdrl_train.model.fsdp import full_weights
from kdrl_train.model.load import load_model
from kdrl_train.model.policy import Policy
from kdrl_train.rollouts.sampler import SampleRequest, generate_rollouts
from kdrl_train.waiting import Poll


class GenerateEngine:
    """An Engine that samples in this process.

    Args:
        policy: must not be sharded where the model is shared.
        shared: True: sample from the policy's own model, so that nothing is copied. False: keep a
            whole copy of it on each rank, in the compute dtype.
    """

    def __init__(
        self, config: TrainConfig, policy: Policy, tokenizer: Any, *, shared: bool
    ) -> None:
        self.version = 0
        self.tokenizer = tokenizer
        self.sampled_vocab_size = policy.sampled_vocab_size
        self.model = policy.model
        self.context: Callable[[], AbstractContextManager[Any]] = policy.autocast
        self.shared = shared
        if not shared:
            dtype = policy.compute_dtype
            self.model = load_model(config.model.policy, "model.policy", config.model, dtype)
            self.context = nullcontext

    def generate(self, request: SampleRequest, poll: Poll | None = None) -> Rollouts:
        """Sample as Engine says; poll is called before each token."""
        with self.context():
            return generate_rollouts(
                self.model,
                self.tokenizer,
                request,
                poll,
                sampled_vocab_size=self.sampled_vocab_size,
            )

    @torch.no_grad()
    def load(self, policy: Policy, version: int) -> None:
        """Load weights as Engine says.

        Raises: RuntimeError where a weight of the copy gets none.
        """
        if not self.shared:
            missing = dict(self.model.named_parameters())
            for name, weight in full_weights(policy.model):
                missing.pop(name).copy_(weight)
            if missing:
                raise RuntimeError(f"every weight must be loaded, got none for {sorted(missing)}")
        self.version = version

    def close(self) -> None:
        """Do as Engine says: it holds nothing."""
