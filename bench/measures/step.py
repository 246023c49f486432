"""Measures the head's share of a training step of a causal LM with a real model's sizes.

The weights are random. A step is the backbone's forward pass over a batch of sequences, the head
through a provider's call, and backward through everything; there is no optimiser. The head alone is
the same call on existing hidden states. For KDRL the teacher's hidden states exist as well: its
backbone is not timed.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from bench.inputs import SPREADS, Inputs, make_inputs
from bench.machine import DEVICE, clock
from bench.measures.timing import (
    OUT_OF_TIME,
    failure,
    fastest_setting,
    sample_rounds,
    share,
    timed_call,
)
from bench.ops import OPS_BY_NAME, Op
from bench.providers import Provider, Refusal, Setting, check, forward, version
from bench.providers.home import PROVIDERS
from bench.results_file import OURS, Record, record
from bench.shapes import BF16, SHAPES, Shape

OPS = tuple(OPS_BY_NAME[name] for name in ("GRPO", "KDRL exact"))
DEFAULT = tuple(one for one in PROVIDERS if one.name in (OURS, "PyTorch, full logits"))
PROFILE = "flat"
"""Profile of the entropy: random weights lift no token."""
BATCHES = 2
"""Batches used in turn."""
OLD_NOISE = 0.02
"""Noise of the old log-probabilities, nats: inside the clip range, since clipped rows cost less."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes of a Qwen2 model and its batch, beside hidden size, vocabulary and tokens."""

    shape: Shape
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    length: int
    """Tokens of one sequence; there are shape.N / length of them."""
    tied: bool
    """Whether the head is the embedding."""


def _cut(name: str, tokens: int) -> Shape:
    return replace(SHAPES[name], N=tokens)


QWEN_1_5B = Shape("qwen2.5-1.5b", 8192, 1536, 151936, 3584, 152064, BF16, "Qwen2.5-1.5B, 7B")
MODELS = (
    (
        ModelSizes(_cut("qwen2.5-0.5b", 16384), 24, 14, 2, 4864, 2048, tied=True),
        ModelSizes(QWEN_1_5B, 28, 12, 2, 8960, 2048, tied=True),
        ModelSizes(_cut("qwen2.5-7b", 4096), 28, 28, 4, 18944, 2048, tied=False),
    )
    if DEVICE == "cuda"
    else (ModelSizes(_cut("cpu-small", 256), 2, 16, 4, 2816, 128, tied=True),)
)
"""Fewer tokens the larger the model: all activations are kept, there is no checkpointing."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A batch of sequences, and the inputs of the head on their hidden states."""

    ids: Tensor
    """[sequences, length] int64."""
    inputs: Inputs
    """hidden: a detached copy of the backbone's, which requires a gradient; weight: the model's."""


class Trainee:
    """A model with its batches, which times a step, and the head alone."""

    def __init__(self, sizes: ModelSizes) -> None:
        self.sizes = sizes
        self.model = _build(sizes)
        head_inputs = make_inputs(sizes.shape, PROFILE)
        self.batches = [self._batch(head_inputs, seed) for seed in range(BATCHES)]

    def step_ms(self, provider: Provider, op: Op, setting: Setting, batch: StepBatch) -> float:
        """Time forward and backward of everything, in ms. The gradients stay in the model.

        Raises: RuntimeError where the gradient did not reach the first layer.
        """
        self.model.zero_grad(set_to_none=True)
        start = clock()
        inputs = replace(batch.inputs, hidden=self._hidden(batch.ids))
        forward(provider, inputs, op, setting)["loss"].backward()
        end = clock()
        if next(self.model.model.layers[0].parameters()).grad is None:
            raise RuntimeError(f"{provider.name}, {op.name}: the backbone got no gradient")
        return 1e3 * (end - start)

    def head_ms(self, provider: Provider, op: Op, setting: Setting, batch: StepBatch) -> float:
        """Time forward and backward of the head on existing hidden states, in ms."""
        self.model.zero_grad(set_to_none=True)
        return sum(timed_call(provider, batch.inputs, op, setting))

    def describe(self, op: Op) -> dict[str, Any]:
        """Describe the model for a record."""
        sizes = self.sizes
        description: dict[str, Any] = {
            "layers": sizes.layers,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokens": sizes.shape.N,
            "sequence_length": sizes.length,
            "tied_head": sizes.tied,
            "source": f"Qwen2 of transformers, random weights; sizes: {sizes.shape.source}",
        }
        if op.kd:
            description["teacher"] = "hidden states given: its backbone is not timed"
        return description

    def _hidden(self, ids: Tensor) -> Tensor:
        """Compute the hidden states [N, H] by the backbone."""
        return self.model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)

    @torch.no_grad()
    def _batch(self, head_inputs: Inputs, seed: int) -> StepBatch:
        shape, weight = self.sizes.shape, self.model.lm_head.weight
        rng = torch.Generator(head_inputs.hidden.device).manual_seed(seed)
        size = shape.N // self.sizes.length, self.sizes.length + 1
        V = min(shape.V, shape.V_t)
        ids = torch.randint(V, size, generator=rng, device=head_inputs.hidden.device)
        tokens = ids[:, 1:].flatten()
        hidden = self._hidden(ids[:, :-1])
        old = kk.linear_logprobs(hidden, weight[:V], tokens).logprobs
        noise = torch.randn(shape.N, generator=rng, device=old.device)
        inputs = replace(
            head_inputs,
            hidden=hidden.requires_grad_(),
            weight=weight,
            tokens=tokens,
            old_logprobs=old + OLD_NOISE * noise,
            teacher_hidden=head_inputs.teacher_hidden.roll(seed, dims=0),
        )
        return StepBatch(ids[:, :-1], inputs)


def _build(sizes: ModelSizes) -> Any:
    """Build a transformers model on this device; head rows are as long as those of inputs.py."""
    from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: PLC0415 (seconds to import)

    shape = sizes.shape
    config = Qwen2Config(
        hidden_size=shape.H,
        vocab_size=shape.V,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        intermediate_size=sizes.intermediate,
        max_position_embeddings=max(4096, sizes.length),
        tie_word_embeddings=sizes.tied,
    )
    with torch.random.fork_rng(), torch.device(DEVICE), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=shape.dtype, attn_implementation="sdpa"
        )
        model.lm_head.weight.normal_(
            std=SPREADS[PROFILE] / math.sqrt(shape.H)
        )  # logits spread as in PROFILE
    return model.train()


def records(
    rounds: int,
    deadline: float,
    providers: Sequence[Provider] = DEFAULT,
    models: Sequence[ModelSizes] = MODELS,
) -> Iterator[Record]:
    """Yield records of every model, operation and provider; models share the time equally."""
    for index, sizes in enumerate(models):
        yield from _of_model(sizes, rounds, share(deadline, index, len(models)), providers)
        gc.collect()  # modules refer to each other
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def _of_model(
    sizes: ModelSizes, rounds: int, deadline: float, providers: Sequence[Provider]
) -> Iterator[Record]:
    trainee, reason = None, OUT_OF_TIME
    if time.monotonic() < deadline:
        try:
            trainee = Trainee(sizes)
        except (ImportError, torch.OutOfMemoryError) as error:
            reason = failure(error)
    cases = [(op, provider) for op in OPS for provider in providers]
    if trainee is None:
        yield from (_record(sizes, *case) | {"status": reason} for case in cases)
        return
    records_of_cases = [_enter(trainee, *case, deadline) for case in cases]
    measures = {
        index: _measure(trainee, *case, records_of_cases[index]["setting"])
        for index, case in enumerate(cases)
        if records_of_cases[index]["status"] == "ok"
    }
    for index, samples in sample_rounds(measures, rounds, deadline).items():
        records_of_cases[index]["status"] = samples.status
        if samples.values:
            step_ms, head_ms = zip(*samples.values, strict=True)
            model = trainee.describe(cases[index][0])
            records_of_cases[index] |= {
                "model": model,
                "step_ms": [*step_ms],
                "head_ms": [*head_ms],
            }
    yield from records_of_cases


def _record(sizes: ModelSizes, op: Op, provider: Provider) -> Record:
    return record(
        "step",
        op.name,
        sizes.shape,
        PROFILE,
        provider.name,
        package=provider.package,
        version=version(provider),
        setting={},
    )


def _enter(trainee: Trainee, op: Op, provider: Provider, deadline: float) -> Record:
    """A record that has the setting to time, or the reason why there is none."""
    one = _record(trainee.sizes, op, provider)
    try:
        check(provider, op)
    except Refusal as refusal:
        return one | {"status": str(refusal)}
    return one | {
        "setting": dict(fastest_setting(provider, trainee.batches[0].inputs, op, deadline))
    }


def _measure(
    trainee: Trainee, op: Op, provider: Provider, setting: Setting
) -> Callable[[int], tuple[float, float]]:
    """Make a measure for sample_rounds: (ms of the step, ms of the head)."""

    def call(number: int) -> tuple[float, float]:
        batch = trainee.batches[number % BATCHES]
        calls = [trainee.step_ms, trainee.head_ms]
        first = number // BATCHES % 2  # the head comes first in every other pair of rounds
        ms = {index: calls[index](provider, op, setting, batch) for index in (first, 1 - first)}
        return ms[0], ms[1]

    return call
