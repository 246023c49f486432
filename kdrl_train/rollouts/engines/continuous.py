"""Samples with transformers' continuous batching: a finished completion makes room for the next.

It is meant for GPUs, where it has not been measured. It records the log-probabilities of the
kernel that samples. Its draws come from one random stream, seeded by (seed, step, first), so they
depend on what shares the batch: they differ from those of the other engines, and between numbers
of ranks.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from kdrl_train.batch import Rollouts
from kdrl_train.config import TrainConfig
from kdrl_train.errors import EngineError
from kdrl_train.model.eos import eos_ids
from kdrl_train.model.policy import Policy
from kdrl_train.rollouts.engines.generate import GenerateEngine
from kdrl_train.rollouts.rendering import completion_text
from kdrl_train.rollouts.sampler import SampleRequest
from kdrl_train.waiting import Poll

PAGE = 256
"""Tokens in one block of the key-value cache; transformers has the same default."""


class ContinuousEngine(GenerateEngine):
    """An Engine that samples from a whole copy of the policy on each rank.

    Raises: ValueError where some columns of the policy's head must not be drawn: continuous
        batching cannot leave them out.
    """

    def __init__(self, config: TrainConfig, policy: Policy, tokenizer: Any) -> None:
        if policy.sampled_vocab_size is not None and policy.sampled_vocab_size < policy.vocab_size:
            raise ValueError(
                'engine.kind must be "generate" where the policy has columns that its teacher '
                f"lacks, got {policy.vocab_size:,} and {policy.sampled_vocab_size:,}: continuous "
                "batching would draw them"
            )
        attention = "flash_attention_2" if config.model.attention == "flash_attention_2" else "sdpa"
        config = replace(config, model=replace(config.model, attention=attention))
        super().__init__(config, policy, tokenizer, shared=False)

    def generate(self, request: SampleRequest, poll: Poll | None = None) -> Rollouts:
        """Sample as Engine says; poll is called once, before the first token.

        Raises: EngineError where a completion is missing.
        """
        if poll is not None:
            poll()
        stops = eos_ids(self.model, self.tokenizer)
        sampling = request.sampling
        prompts = [list(p) for p in request.prompts for _ in range(sampling.group_size)]
        longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
        draws = {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        together = min(sampling.batch_size, len(prompts))
        entropy = [request.seed, request.step, request.first]
        (seed,) = np.random.SeedSequence(entropy).generate_state(1)
        before, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            by_id = self.model.generate_batch(
                prompts,
                generation_config=GenerationConfig(
                    do_sample=not request.greedy,
                    **({} if request.greedy else draws),
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=stops,
                    pad_token_id=stops[0],
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    return_logprobs=True,
                    seed=int(seed),
                    max_requests_per_batch=sampling.batch_size,
                    num_blocks=together * -(-longest // PAGE),  # by default all memory is taken
                    page_size=PAGE,
                ),
            )
        finally:
            self.model.generation_config = before
        outputs = list(by_id.values())
        errors = [output.error for output in outputs if output.error is not None]
        if len(outputs) < len(prompts) or errors:
            raise EngineError(
                f"continuous batching must return all {len(prompts)} completions, got "
                f"{len(outputs)} and the errors {errors[:3]}: lower sampling.batch_size, or set "
                "engine.kind to generate"
            )
        ids = [torch.tensor(output.generated_tokens) for output in outputs]
        truncated = [int(tokens[-1]) not in stops for tokens in ids]
        return Rollouts(
            prompt_ids=[torch.tensor(prompt) for prompt in prompts],
            completion_ids=ids,
            logprobs=[torch.tensor(output.logprobs, dtype=torch.float32) for output in outputs],
            truncated=torch.tensor(truncated, dtype=torch.bool),
            texts=[
                completion_text(self.tokenizer, tokens.tolist(), cut)
                for tokens, cut in zip(ids, truncated, strict=True)
            ],
        )
