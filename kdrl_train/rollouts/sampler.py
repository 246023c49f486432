"""Completions from transformers `generate`, with the log-probabilities they were sampled at.

P prompts, G completions per prompt, R = P * G, V vocabulary, T tokens of one completion.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from kdrl_train.batch import Rollouts
from kdrl_train.config import SamplingConfig
from kdrl_train.model.eos import eos_ids


class Draw(LogitsProcessor):
    """Draws each token from softmax(logits / temperature) by a uniform number of its own, keeps its
    log-probability, and leaves `generate` no choice but that token.

    The draw inverts the cumulative probability, summed in float64: one number per token decides,
    whatever shares the batch. Columns from vocab_size on are never drawn: the loss knows nothing
    of them either.

    Args:
        uniforms_BT: [B, T] float64 in [0, 1), T the most tokens that may be asked for.
        poll: called before each token; what it raises ends the generation.
    """

    def __init__(
        self,
        uniforms_BT: Tensor,
        temperature: float,
        vocab_size: int,
        poll: Callable[[], None] | None = None,
    ) -> None:
        self.uniforms_BT = uniforms_BT
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.poll = poll
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        """input_ids [B, T so far], scores [B, V] float32 -> [B, V]: 0 where drawn, else -inf."""
        if self.poll is not None:
            self.poll()
        logprobs = (scores[:, : self.vocab_size] / self.temperature).log_softmax(dim=1)
        cumulative = logprobs.double().exp_().cumsum_(dim=1)
        place = self.uniforms_BT[:, len(self.logprobs), None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, place, right=True)  # the first one above: p > 0
        drawn.clamp_(max=cumulative.shape[1] - 1)  # logits that are not finite: see recorded
        self.logprobs.append(logprobs.gather(1, drawn).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def recorded(self) -> Tensor:
        """Log-probabilities of the drawn tokens, [B, T] float32 nats, on the CPU.

        Raises: FloatingPointError where one is not finite: the logits were not.
        """
        logprobs = torch.stack(self.logprobs, dim=1).float().cpu()
        if not logprobs.isfinite().all():
            raise FloatingPointError(
                "the policy's logits must be finite while it samples, got others: its weights are "
                "broken, or sampling.temperature is too small"
            )
        return logprobs


def uniforms(seed: int, step: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): the numbers that draw one completion. A function of its arguments
    alone, so that neither batches nor ranks change what is drawn."""
    return np.random.default_rng([seed, step, prompt, sample]).random(count)


def generate_rollouts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    seed: int,
    step: int,
    vocab_size: int | None = None,
    *,
    first: int = 0,
    poll: Callable[[], None] | None = None,
) -> Rollouts:
    """G completions of each prompt, drawn from softmax(logits / temperature) and nothing else.

    The draw of a completion is a function of (seed, step, place of its prompt in the step, place
    in its group), the prompt and the weights, but for the rounding of logits in another batch; the
    global random state is left as it was, and so are the model's mode and generation config.

    Args:
        model: transformers causal LM.
        tokenizer: decodes the completions; its end-of-sequence token ends one, as do the model's.
        prompts: P token lists, each of at least one token.
        sampling: group_size, max_new_tokens, temperature, batch_size.
        vocab_size: columns from here on are never drawn; None: the model's own width.
        first: place of the first prompt in the step, where this is a part of its prompts.
        poll: called before each token; what it raises ends the generation.
    Raises: ValueError for an empty prompt.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts must hold at least one token each, got an empty one")
    stops = torch.tensor(eos_ids(model, tokenizer))
    columns = model.get_output_embeddings().weight.shape[0]
    tensors = [torch.tensor(list(prompt), dtype=torch.int64) for prompt in prompts]
    prompt_ids = [t for t in tensors for _ in range(sampling.group_size)]
    completions: list[Tensor] = []
    logprobs: list[Tensor] = []
    cut: list[bool] = []
    with _sampling_mode(model):
        for start in range(0, len(prompt_ids), sampling.batch_size):
            batch = prompt_ids[start : start + sampling.batch_size]
            places = (divmod(r, sampling.group_size) for r in range(start, start + len(batch)))
            numbers = [
                uniforms(seed, step, first + p, g, sampling.max_new_tokens) for p, g in places
            ]
            draw = Draw(
                torch.from_numpy(np.stack(numbers)).to(model.device),
                sampling.temperature,
                columns if vocab_size is None else vocab_size,
                poll,
            )
            ids_BT = _generate(model, batch, stops, sampling.max_new_tokens, draw)
            logprobs_BT = draw.recorded()
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
        texts=[tokenizer.decode(c, skip_special_tokens=True) for c in completions],
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
    max_new_tokens: int,
    draw: Draw,
) -> Tensor:
    """B prompts, left-padded -> completion ids [B, T] on the CPU; what follows a row's first
    end-of-sequence token is padding."""
    device = model.device
    width = max(len(p) for p in prompts)
    pad = int(stops[0])
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    config = GenerationConfig(
        do_sample=False,  # Draw has drawn
        max_new_tokens=max_new_tokens,
        eos_token_id=stops.tolist(),
        pad_token_id=pad,
        use_cache=True,
    )
    with torch.no_grad():
        out = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
        )
    return out[:, width:].cpu()
