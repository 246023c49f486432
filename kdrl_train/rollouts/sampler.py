"""Samples completions with transformers `generate`, and records their log-probabilities.

P prompts, G completions per prompt, R = P * G, B completions of one batch, V vocabulary, T tokens
of one completion.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from kdrl_train.batch import Rollouts
from kdrl_train.config import SamplingConfig
from kdrl_train.copies import to_device
from kdrl_train.errors import BrokenWeightsError
from kdrl_train.model import kept
from kdrl_train.model.eos import eos_ids
from kdrl_train.rollouts.agreement import Agreement
from kdrl_train.rollouts.kv_cache import roomy_cache
from kdrl_train.rollouts.rendering import completion_text
from kdrl_train.waiting import Poll


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """Describes R = P * G completions to sample: G in sequence for each of P prompts."""

    prompts: Sequence[Sequence[int]]
    """P lists of token ids, each of at least one token."""
    sampling: SamplingConfig
    """Gives group_size (G), max_new_tokens, temperature and batch_size; prompts_per_step is not
    read."""
    seed: int
    """The seed of the run."""
    step: int
    """The step that the completions are for, from 0."""
    first: int = 0
    """Place of the first prompt in the step, where the request holds only a part of its prompts."""
    greedy: bool = False
    """Whether to take the most probable token each time, and draw none; nothing else is random
    then."""
    report: Callable[[int, int], None] | None = None
    """Called now and then while an engine samples, with how many completions have ended and how
    many tokens were drawn so far. The engine `continuous` does not call it."""

    def entropy(self, r: int) -> tuple[int, int, int, int]:
        """Return (seed, step, place of the prompt in the step, place in its group) of completion r.

        An engine that draws each completion from these numbers alone draws the same one whatever
        shares the batch, and on whatever rank the prompt is.
        """
        prompt, sample = divmod(r, self.sampling.group_size)
        return self.seed, self.step, self.first + prompt, sample


MIXES_BATCHES = frozenset({"deepseek_v4", "doge", "git", "recurrent_gemma", "rwkv", "xlstm"})
"""Model types whose code lets the padding of a batch, or its other prompts, change what a prompt is
continued with: each completion is drawn alone."""

REPORT_S = 1.0
"""Seconds between two reports: each waits for the GPU."""


class Tally:
    """Counts the tokens and the ends of the completions of a batch while it is drawn.

    Args:
        report: gets the completions that have ended and the tokens drawn, those before included.
        stops: the tokens that end a completion, on the device of the draws.
        size: completions of the batch.
        before: completions and tokens of the batches before.
    """

    def __init__(
        self,
        report: Callable[[int, int], None],
        stops: Tensor,
        size: int,
        before: tuple[int, int],
    ) -> None:
        self.report, self.stops, self.before = report, stops, before
        self.ended_B = torch.zeros(size, dtype=torch.bool, device=stops.device)
        self.tokens_B = torch.zeros(size, dtype=torch.int64, device=stops.device)
        self.reported = time.monotonic()

    def add(self, drawn_B: Tensor) -> None:
        """Count the next token of each completion that has not ended."""
        self.tokens_B += ~self.ended_B
        self.ended_B |= torch.isin(drawn_B, self.stops)
        if time.monotonic() - self.reported >= REPORT_S:
            self.reported = time.monotonic()
            done, tokens = self.before
            self.report(done + int(self.ended_B.sum()), tokens + int(self.tokens_B.sum()))


class Draw(LogitsProcessor):
    """Draws each token from softmax(logits / temperature) and leaves `generate` no other choice.

    Each token is drawn by a uniform number of its own, which inverts the cumulative probability,
    summed in float64: other completions in the batch change nothing. The log-probability of each
    drawn token is kept.

    Args:
        uniforms_BT: [B, T] float64 in [0, 1), where T is the largest number of tokens to draw.
            None: the most probable token is taken each time.
        sampled_vocab_size: columns from here on are never drawn, since the loss leaves them out.
        poll: called before each token; an exception it raises stops sampling.
        tally: counts the tokens.
    """

    def __init__(
        self,
        uniforms_BT: Tensor | None,
        temperature: float,
        sampled_vocab_size: int,
        poll: Poll | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.uniforms_BT = uniforms_BT
        self.temperature = temperature
        self.sampled_vocab_size = sampled_vocab_size
        self.poll, self.tally = poll, tally
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        """Map scores [B, V] float32 to [B, V]: 0 for the drawn token, -inf for all others."""
        if self.poll is not None:
            self.poll()
        logits = scores[:, : self.sampled_vocab_size]
        if self.temperature != 1:
            logits = logits / self.temperature
        logprobs = logits.log_softmax(dim=1)
        if self.uniforms_BT is None:
            drawn = logprobs.argmax(dim=1, keepdim=True)
        else:
            cumulative = logprobs.exp().cumsum(dim=1, dtype=torch.float64)
            place = self.uniforms_BT[:, len(self.logprobs), None] * cumulative[:, -1:]
            drawn = torch.searchsorted(cumulative, place, right=True)  # the first one above: p > 0
            drawn.clamp_(max=cumulative.shape[1] - 1)  # logits that are not finite: see recorded
        self.logprobs.append(logprobs.gather(1, drawn).squeeze(1))
        if self.tally is not None:
            self.tally.add(drawn.squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def recorded(self) -> Tensor:
        """Return the log-probabilities of the drawn tokens, [B, T] float32 nats, on the CPU.

        Raises: BrokenWeightsError where one is not finite, because the logits were not.
        """
        logprobs = torch.stack(self.logprobs, dim=1).float().cpu()
        if not logprobs.isfinite().all():
            raise BrokenWeightsError(
                "the policy's logits must be finite while it samples, got others: its weights are "
                "broken (start again from an earlier checkpoint, with a lower "
                "optim.learning_rate), or sampling.temperature is too small"
            )
        return logprobs


def uniforms(seed: int, step: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """Return the [count] numbers in [0, 1), float64, that draw the tokens of one completion.

    They are a function of the arguments alone, so neither batches nor ranks change what is drawn.
    """
    return np.random.default_rng([seed, step, prompt, sample]).random(count)


def generate_rollouts(
    model: Any,
    tokenizer: Any,
    request: SampleRequest,
    poll: Poll | None = None,
    *,
    sampled_vocab_size: int | None = None,
    agreement: Agreement | None = None,
) -> Rollouts:
    """Sample the completions of a request from softmax(logits / temperature) and nothing else.

    A completion is a function of request.entropy(r), its prompt and the weights, except where the
    rounding of logits in another batch changes a token. The global random state, the model's mode
    and its generation config stay as they were.

    Args:
        model: transformers causal LM.
        tokenizer: decodes the completions; its end-of-sequence token ends one, as do the model's.
        poll: called before each token; an exception it raises stops sampling.
        sampled_vocab_size: columns from here on are never drawn; None: every column may be drawn.
        agreement: compares completions of each batch with the model's own log-probabilities.
    Raises: ValueError for an empty prompt; EngineError as the agreement does.
    """
    if any(len(prompt) == 0 for prompt in request.prompts):
        raise ValueError("prompts must hold at least one token each, got an empty one")
    sampling = request.sampling
    stops = torch.tensor(eos_ids(model, tokenizer))
    columns = model.get_output_embeddings().weight.shape[0]
    tensors = [torch.tensor(list(prompt), dtype=torch.int64) for prompt in request.prompts]
    prompt_ids = [t for t in tensors for _ in range(sampling.group_size)]
    completions: list[tuple[Tensor, Tensor, bool]] = []
    with _sampling_mode(model):
        alone = model.config.get_text_config().model_type in MIXES_BATCHES
        size = 1 if alone else sampling.batch_size
        for start in range(0, len(prompt_ids), size):
            batch = prompt_ids[start : start + size]
            numbers = None if request.greedy else _numbers(request, start, len(batch))
            before = len(completions), sum(len(ids) for ids, _, _ in completions)
            tally = None
            if request.report is not None:
                request.report(*before)
                device_stops = to_device(stops, model.device)
                tally = Tally(request.report, device_stops, len(batch), before)
            draw = Draw(
                None if numbers is None else to_device(numbers, model.device),
                sampling.temperature,
                columns if sampled_vocab_size is None else sampled_vocab_size,
                poll,
                tally,
            )
            ids_BT = _generate(model, batch, stops, sampling.max_new_tokens, draw)
            pairs = zip(ids_BT, draw.recorded(), strict=True)
            drawn = [_up_to_its_end(ids, logprobs, stops) for ids, logprobs in pairs]
            if agreement is not None:
                agreement.add(batch, [ids for ids, _, _ in drawn], [row for _, row, _ in drawn])
            completions += drawn
    return Rollouts(
        prompt_ids=prompt_ids,
        completion_ids=[ids for ids, _, _ in completions],
        logprobs=[logprobs for _, logprobs, _ in completions],
        truncated=torch.tensor([truncated for _, _, truncated in completions], dtype=torch.bool),
        texts=[completion_text(tokenizer, ids.tolist(), cut) for ids, _, cut in completions],
    )


def _numbers(request: SampleRequest, start: int, size: int) -> Tensor:
    """Return the [B, T] numbers that draw the tokens of B completions from `start` on."""
    count = request.sampling.max_new_tokens
    rows = [uniforms(*request.entropy(r), count) for r in range(start, start + size)]
    return torch.from_numpy(np.stack(rows))


@contextmanager
def _sampling_mode(model: Any) -> Iterator[None]:
    """Set evaluation mode and an empty generation config, and restore both at the end.

    Otherwise values of the model's generation config, such as top_k, would apply wherever a caller
    leaves them open.
    """
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
    """Return the completion ids [B, T] of B left-padded prompts, on the CPU.

    What follows the first end-of-sequence token of a completion is padding.
    """
    device = model.device
    width = max(len(p) for p in prompts)
    pad = int(stops[0])
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :] = prompt
        mask[b, width - len(prompt) :] = 1
    config = GenerationConfig(
        do_sample=False,  # Draw has drawn
        max_new_tokens=max_new_tokens,
        eos_token_id=stops.tolist(),
        pad_token_id=pad,
        use_cache=True,
    )
    cache = roomy_cache(model)
    kept.forget(model)
    with torch.no_grad():
        out = model.generate(
            to_device(ids, device),
            attention_mask=to_device(mask, device),
            **({} if cache is None else {"past_key_values": cache}),
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
        )
    return out[:, width:].cpu()


def _up_to_its_end(ids: Tensor, logprobs: Tensor, stops: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Cut ids and logprobs [T] after the first end-of-sequence token; True where there is none."""
    ends = torch.isin(ids, stops).nonzero()
    length = int(ends[0]) + 1 if len(ends) else len(ids)
    return ids[:length].clone(), logprobs[:length].clone(), len(ends) == 0
