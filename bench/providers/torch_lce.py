"""Provides torch.nn.functional.linear_cross_entropy, plain and in chunks, from torch 2.13.

The mean takes its gradients in the forward pass. Without reduction the chunks are projected again
in the backward pass, each with its tokens' coefficients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.inputs import Inputs
from bench.ops import OPS
from bench.providers import Provider

CHUNKING = (None, "auto", "aspect_ratio:1")
"""None: full logits. Chunks as large as the hidden states ("aspect_ratio:1") or half of that
("auto", which is "aspect_ratio:2" but for 16-bit numbers on a CPU)."""


def _score(
    hidden: Tensor, weight: Tensor, tokens: Tensor, _entropy: bool, chunking: str | None
) -> tuple[Tensor, None]:
    """Return float32, although a plain call returns the dtype of the hidden states."""
    nll = F.linear_cross_entropy(
        hidden, weight, tokens, reduction="none", options=_options(chunking)
    )
    return -nll.float(), None


def _cross_entropy(inputs: Inputs, chunking: str | None) -> Tensor:
    return F.linear_cross_entropy(
        inputs.hidden, inputs.shared_weight, inputs.tokens, options=_options(chunking)
    )


def _options(chunking: str | None) -> Any:
    return chunking and torch.nn.LinearCrossEntropyOptions(chunking_method=chunking)


def _refused() -> dict[str, str]:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return {op.name: "needs torch 2.13" for op in OPS}
    return {"logprob + entropy": "no entropy"}


PROVIDERS = (
    Provider(
        name="torch linear_cross_entropy",
        settings=tuple({"chunking": chunking} for chunking in CHUNKING),
        score=_score,
        cross_entropy=_cross_entropy,
        refused=_refused(),
    ),
)
