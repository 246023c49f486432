"""Provides Cut cross-entropy: -log p of each token, by kernels that write no logits to memory.

On a GPU its default filter is on: in the backward pass it leaves out the blocks of probabilities
that are all below eps / 32 of the dtype, 2**-12 for bfloat16, and with them a little gradient.
Those kernels give gradients of 16-bit inputs only. On a CPU, and for float32, the package has full
logits under torch.compile.
"""

from importlib import import_module

import torch
from torch import Tensor

from bench.providers import Provider


def _score(hidden: Tensor, weight: Tensor, tokens: Tensor, _entropy: bool) -> tuple[Tensor, None]:
    impl = "cce" if hidden.is_cuda and hidden.dtype.itemsize == 2 else "torch_compile"
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    with torch._dynamo.config.patch(recompile_limit=1000):  # it would raise after 8 variants
        return -loss(hidden, weight, tokens, reduction="none", impl=impl), None


PROVIDERS = (
    Provider(
        name="Cut cross-entropy",
        package="cut-cross-entropy",
        score=_score,
        refused={"logprob + entropy": "no entropy"},
    ),
)
