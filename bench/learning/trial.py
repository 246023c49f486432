"""Trains one small next-token model and measures its loss on text that it has not seen."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

import kdrl_kernels as kk
from bench.learning.text import Corpus, is_rare, stream_of
from kdrl_train.tools.toy.models import ArchitectureConfig, make_model

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.95)),
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}
CLIP = 1.0
"""Largest norm of the gradient."""
LOSSES_EVERY = 10
"""Steps whose mean loss is one number of the curve."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Says how large model and run are."""

    vocab_size: int = 8192
    hidden: int = 128
    layers: int = 2
    intermediate: int = 256
    length: int = 128
    sequences: int = 4
    steps: int = 250
    warmup: int = 20
    """Steps in which the learning rate grows to its highest; then it falls to 0, linearly."""
    validation: int = 32768
    """Tokens of the validation loss."""
    rare_below: int = 50
    """A token seen fewer times in the training stream counts as rare."""


@dataclass(frozen=True, slots=True)
class HeadGradient:
    """Says how dL/dlogits reaches the hidden states and the head."""

    kind: Literal["exact", "sketch", "dropped"]
    threshold: float = 0.0

    @property
    def name(self) -> str:
        """Return its name in files and tables."""
        power = float(self.threshold).hex().split("p")[1]
        return self.kind if self.kind == "exact" else f"{self.kind} 2^{power}"

    def loss(self, hidden: Tensor, weight: Tensor, tokens: Tensor, seed: int) -> Any:
        """Return the mean cross entropy, and how many entries a row of dL/dlogits has."""
        N, V = len(tokens), len(weight)
        if self.kind == "dropped":
            losses, kept = dropped_losses(hidden, weight, tokens, self.threshold)
            return losses.mean(), kept / N
        options: dict[str, Any] = {}
        if self.kind == "sketch":
            sketch = kk.Sketch(threshold=self.threshold, seed=seed, flat=math.inf)
            options = {"backward": "sketch", "sketch": sketch}
        out = kk.linear_token_loss(
            hidden, weight, tokens, lambda rows: -rows.logprobs, normalizer=N, **options
        )
        return out.loss, float(out.metrics.get("entries", N * V)) / N


def dropped_losses(
    hidden: Tensor, weight: Tensor, tokens: Tensor, threshold: float
) -> tuple[Tensor, float]:
    """Return cross entropies [N] whose gradient lacks each p below the threshold, and what stays.

    This is the foil: a filter that the library does not have, since it is biased. The entry of
    the token itself stays as it is.
    """
    logits = hidden @ weight.T
    with torch.no_grad():
        logp = logits.log_softmax(dim=1)
        of_token = logp.gather(1, tokens[:, None])
        gradient = logp.exp_()
        gradient.masked_fill_(gradient < threshold, 0)
        gradient.scatter_(1, tokens[:, None], of_token.expm1())
        kept = gradient.count_nonzero().item()
    carrier = (logits * gradient).sum(dim=1)  # its gradient is what must reach hidden and weight
    return carrier - carrier.detach() - of_token.squeeze(1), kept


def run(
    sizes: Sizes, corpus: Corpus, gradient: HeadGradient, optimizer: str, rate: float, seed: int
) -> dict[str, Any]:
    """Train a model; return its losses of training, and of validation on all and rare tokens."""
    architecture = ArchitectureConfig(
        family="llama", hidden=sizes.hidden, layers=sizes.layers, intermediate=sizes.intermediate
    )
    model = make_model(architecture, corpus.tokenizer, seed)
    body, weight = model.model, model.lm_head.weight
    stepper = OPTIMIZERS[optimizer](model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: _share(step, sizes))
    N = sizes.length * sizes.sequences
    stream = stream_of(corpus.train, sizes.steps * N + 1, seed)
    losses, entries = [], []
    for step in range(sizes.steps):
        part = stream[step * N : (step + 1) * N + 1]
        hidden = body(part[:-1].view(-1, sizes.length)).last_hidden_state.flatten(0, 1)
        loss, kept = gradient.loss(hidden, weight, part[1:], seed=seed * sizes.steps + step)
        stepper.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        stepper.step()
        schedule.step()
        losses.append(loss.item())
        entries.append(kept)
    targets, validation = _validate(model, corpus.validation[: sizes.validation + 1], sizes)
    rare = is_rare(targets, stream[1:], sizes.rare_below)
    return {
        "losses": [
            sum(losses[i : i + LOSSES_EVERY]) / len(losses[i : i + LOSSES_EVERY])
            for i in range(0, len(losses), LOSSES_EVERY)
        ],
        "all": validation.mean().item(),
        "rare": validation[rare].mean().item(),
        "rare_tokens": int(rare.sum()),
        "entries": sum(entries) / len(entries),
    }


def _share(step: int, sizes: Sizes) -> float:
    """Return the share of the highest learning rate at a step."""
    return min((step + 1) / sizes.warmup, 1 - step / sizes.steps)


@torch.no_grad()
def _validate(model: Any, tokens: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return targets and losses of whole sequences, in float64."""
    whole = (len(tokens) - 1) // sizes.length * sizes.length
    targets, losses = tokens[1 : whole + 1], []
    for rows, target in zip(
        tokens[:whole].view(-1, sizes.length).split(sizes.sequences),
        targets.split(sizes.length * sizes.sequences),
        strict=True,
    ):
        hidden = model.model(rows).last_hidden_state.flatten(0, 1)
        losses.append(-kk.linear_logprobs(hidden, model.lm_head.weight, target).logprobs.double())
    return targets, torch.cat(losses)
