"""Provides QuACK: cross entropy in CUTLASS kernels, fused with the head, or on all logits."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench.inputs import Inputs
from bench.providers import Provider

ALIGNED = 8
"""Its chunks need sizes that are multiples of this, and 16-bit numbers for its own GEMM."""


def _library() -> Any:
    return import_module("quack.linear_cross_entropy")


def _score(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    _entropy: bool,
    **_: int,
) -> tuple[Tensor, None]:
    """Compute on all logits, since its chunks give no loss per token; gradients overwrite them."""
    losses = _library().linear_cross_entropy_func(
        hidden, weight, None, tokens, reduction="none", inplace_backward=True
    )
    return -losses, None


def _cross_entropy(inputs: Inputs, chunk_size: int) -> Tensor:
    """Compute in chunks where they are possible, else on all logits, as its nn.Module does."""
    weight = inputs.shared_weight
    aligned = all(size % ALIGNED == 0 for size in (*inputs.hidden.shape, len(weight)))
    if aligned and inputs.hidden.dtype != torch.float32:
        return _library().chunked_linear_cross_entropy(
            inputs.hidden, weight, inputs.tokens, chunk_size=chunk_size
        )
    return _library().linear_cross_entropy_func(
        inputs.hidden, weight, None, inputs.tokens, inplace_backward=True
    )


PROVIDERS: tuple[Provider, ...] = (
    Provider(
        name="QuACK",
        package="quack-kernels",
        gpu_only="CUTLASS kernels for Hopper and newer",
        settings=({"chunk_size": 4096}, {"chunk_size": 2048}),
        score=_score,
        cross_entropy=_cross_entropy,
        refused={"logprob + entropy": "it has no entropy"},
    ),
)
