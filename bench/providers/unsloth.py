"""Provides Unsloth Zoo as a black box: by its signatures and docstrings, its source not read.

Triton on a GPU; on a CPU, and by its docstring wherever Triton fails, it falls back to PyTorch.
"""

import functools
import os
import tempfile
from importlib import import_module
from typing import Any

from torch import Tensor

from bench.inputs import Inputs
from bench.providers import Provider
from bench.providers.verl import bare_package

BETA = {"fkl": 0.0, "rkl": 1.0, "jsd": 0.5}
"""The parameter of its generalised Jensen-Shannon divergence, by KD term."""


@functools.cache
def _library() -> Any:
    """Import its module of losses fused with the head.

    unsloth_zoo's own __init__ refuses to run without unsloth, which patches transformers and trl.
    The bare package stays, for what a call may import later.
    """
    bare_package("unsloth_zoo")
    # else it makes a folder where the command was typed
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="unsloth-"))
    return import_module("unsloth_zoo.fused_losses.fused_linear")


def _score(
    hidden: Tensor, weight: Tensor, tokens: Tensor, entropy: bool, rows_per_chunk: int | None
) -> tuple[Tensor, Tensor | None]:
    outputs = _library().fused_linear_logprobs(
        hidden, weight, tokens, return_entropy=entropy, rows_per_chunk=rows_per_chunk
    )
    return outputs if entropy else (outputs, None)


def _divergence(inputs: Inputs, kd: str, rows_per_chunk: int | None) -> Tensor:
    """Return the 0-d mean over rows."""
    return _library().fused_linear_jsd(
        inputs.hidden,
        inputs.shared_weight,
        inputs.teacher_hidden,
        inputs.shared_teacher_weight,
        beta=BETA[kd],
        rows_per_chunk=rows_per_chunk,
    )


def _cross_entropy(inputs: Inputs, rows_per_chunk: int | None) -> Tensor:
    return _library().fused_linear_cross_entropy(
        inputs.hidden,
        inputs.shared_weight,
        None,
        inputs.tokens,
        divisor=inputs.shape.N,
        rows_per_chunk=rows_per_chunk,
    )


PROVIDERS: tuple[Provider, ...] = (
    Provider(
        name="Unsloth Zoo (black box)",
        package="unsloth_zoo",
        settings=({"rows_per_chunk": None}, {"rows_per_chunk": 4096}),  # None: its own choice
        score=_score,
        divergence=_divergence,
        cross_entropy=_cross_entropy,
    ),
)
