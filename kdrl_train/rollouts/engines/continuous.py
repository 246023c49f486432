"""transformers' continuous batching as the engine: a finished completion makes room for the next.

For GPUs: on a CPU `generate` is many times faster. Log-probabilities are those of the kernel that
samples. Its draws come from one stream seeded by (seed, step, first): they depend on what shares
the batch, so they are not those of the other engine, nor the same on another number of ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from kdrl_train.batch import Rollouts
from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.errors import EngineError
from kdrl_train.model.eos import eos_ids
from kdrl_train.model.policy import Policy
from kdrl_train.rollouts.engines.generate import GenerateEngine

PAGE = 256
"""Tokens of a block of the key-value cache, as transformers has it."""


class ContinuousEngine(GenerateEngine):
    """Engine (see the package): a whole copy of the policy on each rank, never the policy itself.

    Raises: ValueError where the policy's head is wider than the columns that may be drawn, which
        continuous batching cannot leave out.
    """

    def __init__(self, config: TrainConfig, policy: Policy, tokenizer: Any) -> None:
        if policy.sampled_vocab_size is not None and policy.sampled_vocab_size < policy.vocab_size:
            raise ValueError(
                'engine.kind must be "generate" where the policy has columns that its teacher '
                f"lacks, got {policy.vocab_size:,} and {policy.sampled_vocab_size:,}: continuous "
                "batching would draw them"
            )
        attention = "flash_attention_2" if config.model.attention == "flash_attention_2" else "sdpa"
        own = replace(config, model=replace(config.model, attention=attention))
        super().__init__(own, policy, tokenizer, shared=False)

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
        """See Engine. Raises: EngineError where it does not answer every request."""
        if poll is not None:
            poll()
        stops = eos_ids(self.model, self.tokenizer)
        requests = [list(p) for p in prompts for _ in range(sampling.group_size)]
        longest = max(map(len, requests), default=0) + sampling.max_new_tokens
        together = min(sampling.batch_size, len(requests))
        state = np.random.SeedSequence([seed, step, first]).generate_state(1)
        before, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            found = self.model.generate_batch(
                requests,
                generation_config=GenerationConfig(
                    do_sample=True,
                    temperature=sampling.temperature,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=stops,
                    pad_token_id=stops[0],
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    return_logprobs=True,
                    seed=int(state[0]),
                    max_requests_per_batch=sampling.batch_size,
                    num_blocks=together * -(-longest // PAGE),  # not all memory there is
                    page_size=PAGE,
                ),
            )
        finally:
            self.model.generation_config = before
        outputs = list(found.values())
        errors = [output.error for output in outputs if output.error is not None]
        if len(outputs) < len(requests) or errors:
            raise EngineError(
                f"continuous batching must answer all {len(requests)} requests, got {len(outputs)} "
                f"answers and the errors {errors[:3]}: lower sampling.batch_size, or set "
                "engine.kind to generate"
            )
        ids = [torch.tensor(output.generated_tokens) for output in outputs]
        return Rollouts(
            prompt_ids=[torch.tensor(request) for request in requests],
            completion_ids=ids,
            logprobs=[torch.tensor(output.logprobs, dtype=torch.float32) for output in outputs],
            truncated=torch.tensor([int(t[-1]) not in stops for t in ids], dtype=torch.bool),
            texts=self.tokenizer.batch_decode(
                [tokens.tolist() for tokens in ids], skip_special_tokens=True
            ),
        )
