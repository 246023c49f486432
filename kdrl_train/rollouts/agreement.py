"""Compares what a sampler recorded with what the model computes of each completion alone.

A model whose code lets the prompts of a batch, their padding or an earlier call change a completion
samples from another distribution than its own, and no sampled token shows it. B completions of one
batch, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdrl_train.errors import EngineError
from kdrl_train.model import kept, rotary

COMPARED = 256
"""Tokens of a completion that are compared, the first ones."""
FEW = 256
"""Of fewer tokens the mean may be ten times as large: rounding moves single tokens by more."""


class Agreement:
    """Compares a few completions of each batch, and stops where they differ too much.

    Args:
        temperature: of the sampling.
        columns: columns of the head from here on are never drawn; None: all are.
        allowed: largest mean of |log p alone - log p recorded| over the tokens so far, in nats.
    """

    def __init__(self, model: Any, temperature: float, columns: int | None, allowed: float) -> None:
        self.model, self.temperature, self.columns = model, temperature, columns
        self.allowed = allowed / min(temperature, 1.0)  # rounding of logits counts for more then
        self.total, self.tokens = 0.0, 0

    def add(
        self, prompts: Sequence[Tensor], completions: Sequence[Tensor], logprobs: Sequence[Tensor]
    ) -> None:
        """Compare two completions of a batch, those of the shortest and of the longest prompt.

        Where rotary factors change at some length, a token before it is sampled with other factors
        than a pass over a longer sequence has: only the tokens up to that length are compared.

        Args:
            prompts, completions: B token ids each, at least one token each.
            logprobs: B times what the sampler recorded for the tokens of a completion, in nats.
        Raises: EngineError where the mean over all tokens compared so far is larger than allowed.
        """
        lengths = [len(prompt) for prompt in prompts]
        same = rotary.longest(self.model.config.get_text_config())
        for b in sorted({lengths.index(min(lengths)), lengths.index(max(lengths))}):
            count = COMPARED if same is None else min(COMPARED, max(1, same + 1 - lengths[b]))
            ids = completions[b][:count]
            alone = self.alone(prompts[b], ids)
            self.total += (alone - logprobs[b][: len(ids)]).abs().sum().item()
            self.tokens += len(ids)
        mean = self.total / self.tokens
        if not mean <= self.allowed * (1 if self.tokens >= FEW else 10):
            remedy = "set sampling.batch_size to 1" if len(prompts) > 1 else "name another model"
            raise EngineError(
                "completions must be sampled at the log-probabilities that the model has for them "
                f"alone, to {self.allowed:g} nats (max_sampler_mismatch), got a mean difference of "
                f"{mean:.2g} over {self.tokens} tokens: the model's code lets the prompts of a "
                "batch, a call before it or tokens behind it change what a token is drawn from; "
                f"{remedy}"
            )

    @torch.no_grad()
    def alone(self, prompt: Tensor, completion: Tensor) -> Tensor:
        """Return the log-probabilities [T] of a completion [T], on the CPU, by a forward pass over
        it and its prompt alone, without a cache."""
        kept.forget(self.model)
        ids, count = torch.cat([prompt, completion[:-1]]), len(completion)
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(  # logits of the prompt are not computed
            lambda _module, inputs: (inputs[0][..., -count:, :], *inputs[1:]) if inputs else None
        )
        try:
            out = self.model(input_ids=ids[None].to(self.model.device), use_cache=False)
        finally:
            handle.remove()
        logits = out.logits[0, -count:, : self.columns].float() / self.temperature
        chosen = completion.to(logits.device)[:, None]
        return logits.log_softmax(dim=1).gather(1, chosen).squeeze(1).cpu()
