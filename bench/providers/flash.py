"""Provides flash-attn: cross entropy in Triton, on all logits."""

from importlib import import_module

from torch import Tensor

from bench.providers import Provider


def _score(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    _entropy: bool,
) -> tuple[Tensor, None]:
    """Compute log-probabilities; their gradient overwrites the logits."""
    module = import_module("flash_attn.ops.triton.cross_entropy")
    losses, _ = module.cross_entropy_loss(hidden @ weight.T, tokens, inplace_backward=True)
    return -losses, None


PROVIDERS: tuple[Provider, ...] = (
    Provider(
        name="flash-attn cross entropy",
        package="flash-attn",
        gpu_only="Triton kernels in a CUDA package",
        score=_score,
        refused={"logprob + entropy": "it has no entropy"},
    ),
)
