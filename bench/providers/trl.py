"""Provides TRL's kernels: tiles of the projection go into running sums, by Triton or PyTorch.

Both project again in the backward pass and add gradients up in float32; neither holds [N, V].
The divergence takes its tiles of logits in float32, 4096 tokens by 32768 of the vocabulary; the
log-probability takes them in the dtype of the hidden states.
"""

from importlib import import_module

from torch import Tensor

from bench.inputs import Inputs
from bench.providers import Provider

BETA = {"fkl": 0.0, "rkl": 1.0, "jsd": 0.5}
"""The teacher's share of the mixture in its Jensen-Shannon divergence."""
VOCABULARY_TILES = (8192, 32768)
"""Its trainers use 32768."""


def _score(
    hidden: Tensor, weight: Tensor, tokens: Tensor, entropy: bool, chunk_size: int
) -> tuple[Tensor, Tensor | None]:
    function = import_module("trl.kernels").ChunkedLogProbFunction
    bias, temperature, softcap, scale = None, 1.0, None, 1.0
    options = (temperature, chunk_size, softcap, scale, ("entropy",) if entropy else ())
    lp, h, *_ = function.apply(hidden, weight, bias, tokens, *options)
    return lp, h


def _divergence(inputs: Inputs, kd: str, **_of_score: int) -> Tensor:
    """Cut both heads to the shared rows, since it reads as many as the student has."""
    student = (inputs.hidden, inputs.shared_weight, None)
    teacher = (inputs.teacher_hidden, inputs.shared_teacher_weight, None)
    function = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    kl, _ = function.apply(*student, *teacher, BETA[kd])
    return kl


PROVIDERS = (
    Provider(
        name="TRL",
        package="trl",
        settings=tuple({"chunk_size": width} for width in VOCABULARY_TILES),
        score=_score,
        divergence=_divergence,
    ),
)
