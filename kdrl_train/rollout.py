"""Completions from transformers `generate`, with the log-probabilities they were sampled at.

P prompts, G completions per prompt, R = P * G, V vocabulary, T tokens of one completion.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from kdrl_train.config import SamplingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """R completions, G in a row for each prompt. All tensors are on the CPU."""

    prompt_ids: list[Tensor]
    """R of [T_prompt] int64; the G completions of a prompt share one tensor."""
    completion_ids: list[Tensor]
    """R of [T] int64, T >= 1, with the end-of-sequence token where one was drawn."""
    logprobs: list[Tensor]
    """R of [T] float32: log softmax(logits / temperature) of each token as sampled, nats."""
    truncated: Tensor
    """[R] bool: cut at max_new_tokens without an end-of-sequence token (finish reason length)."""
    texts: list[str]
    """R decoded completions, without special tokens."""

    @property
    def lengths(self) -> Tensor:
        """[R] int64: tokens of each completion."""
        return torch.tensor([len(ids) for ids in self.completion_ids])


class RecordSampled(LogitsProcessor):
    """Turns logits into logits / temperature, the distribution that is sampled from, and keeps the
    log-probability of each drawn token.

    A processor sees the token drawn from its scores one call later, so one [B, V] is kept, never
    [T, B, V]; `finish` takes the last one. Columns from vocab_size on are never drawn: the loss
    knows nothing of them either.
    """

    def __init__(self, temperature: float, vocab_size: int) -> None:
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.scores: Tensor | None = None
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [B, T so far], scores [B, V] float32 -> [B, V]."""
        self._record(input_ids)
        self.scores = scores / self.temperature
        self.scores[:, self.vocab_size :] = -torch.inf
        return self.scores

    def _record(self, input_ids: Tensor) -> None:
        if self.scores is None:  # before the first draw
            return
        drawn = self.scores.gather(1, input_ids[:, -1:]).squeeze(1)
        self.logprobs.append(drawn - self.scores.logsumexp(dim=1))

    def finish(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, T in all] -> log-probabilities of the drawn tokens [B, T], on the CPU."""
        self._record(input_ids)
        self.scores = None
        return torch.stack(self.logprobs, dim=1).float().cpu()


def seed_of(seed: int, step: int, *stream: int) -> int:
    """One 64-bit seed from (seed, step, stream): distinct, well mixed, the same on any machine."""
    return int(np.random.SeedSequence([seed, step, *stream]).generate_state(1, np.uint64)[0])


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a sequence: of the generation config, the config and the tokenizer.

    Raises: ValueError when none of the three names one.
    """
    found: set[int] = set()
    config = model.config.get_text_config()
    for owner in (model.generation_config, config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    if not found:
        raise ValueError(
            "eos_token_id must be set in the model's generation_config.json or in its tokenizer, "
            "got none: completions could never end"
        )
    return sorted(found)


def generate_rollouts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    seed: int,
    step: int,
    vocab_size: int | None = None,
) -> Rollouts:
    """G completions of each prompt, drawn from softmax(logits / temperature) and nothing else.

    The draw is a function of (seed, step), the prompts, the weights and sampling.batch_size; the
    global random state is left as it was, and so are the model's mode and generation config.

    Args:
        model: transformers causal LM.
        tokenizer: decodes the completions; its end-of-sequence token ends one, as do the model's.
        prompts: P token lists, each of at least one token.
        sampling: group_size, max_new_tokens, temperature, batch_size.
        vocab_size: columns from here on are never drawn; None: the model's own width.
    Raises: ValueError for an empty prompt.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts must hold at least one token each, got an empty one")
    stops = torch.tensor(eos_ids(model, tokenizer))
    tensors = [torch.tensor(list(prompt), dtype=torch.int64) for prompt in prompts]
    prompt_ids = [t for t in tensors for _ in range(sampling.group_size)]
    completions: list[Tensor] = []
    logprobs: list[Tensor] = []
    cut: list[bool] = []
    with _sampling_mode(model):
        for start in range(0, len(prompt_ids), sampling.batch_size):
            batch = prompt_ids[start : start + sampling.batch_size]
            ids_BT, logprobs_BT = _generate(
                model, batch, stops, sampling, seed_of(seed, step, start), vocab_size
            )
            for ids, lps in zip(ids_BT, logprobs_BT, strict=True):
                ends = torch.isin(ids, stops).nonzero()
                length = int(ends[0]) + 1 if len(ends) else len(ids)
                completions.append(ids[:length].clone())
                logprobs.append(lps[:length].clone())
                cut.append(len(ends) == 0)
    return Rollouts(
        prompt_ids=prompt_ids,
        completion_ids=completions,
        logprobs=logprobs,
        truncated=torch.tensor(cut, dtype=torch.bool),
        texts=tokenizer.batch_decode([c.tolist() for c in completions], skip_special_tokens=True),
    )


@contextmanager
def _sampling_mode(model: Any) -> Iterator[None]:
    """Evaluation mode, the key-value cache on, and no generation config of the model's own: what
    its file sets (top_k, repetition_penalty, ...) would fill whatever a caller leaves open."""
    training, generation_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = generation_config
        model.train(training)


def _generate(
    model: Any,
    prompts: list[Tensor],
    stops: Tensor,
    sampling: SamplingConfig,
    seed: int,
    vocab_size: int | None,
) -> tuple[Tensor, Tensor]:
    """B prompts, left-padded -> completion ids [B, T] and log-probs [B, T], on the CPU; what
    follows a row's first end-of-sequence token is padding."""
    device = model.device
    width = max(len(p) for p in prompts)
    pad = int(stops[0])
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    columns = model.get_output_embeddings().weight.shape[0]
    record = RecordSampled(sampling.temperature, columns if vocab_size is None else vocab_size)
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,  # RecordSampled divides, so that what it keeps is what is sampled
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=stops.tolist(),
        pad_token_id=pad,
        use_cache=True,
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        out = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([record]),
        )
    return out[:, width:].cpu(), record.finish(out)
