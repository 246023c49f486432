"""Provides TRL's kernels: tiles of the projection go into running sums, by Triton or PyTorch.

Both project again in the backward pass and add gradients up in float32; neither holds [N, V].
The divergence takes its tiles of logits in float32, 4096 tokens by 32768 of the vocabulary; the
log-probability takes them in the dtype of the hidden states.
"""

import os
from importlib import import_module

import torch
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


def _topk_divergence(inputs: Inputs, **_of_score: int) -> Tensor:
    """Call the function of its trainer for teachers behind a server, 256 rows at a time.

    That trainer passes as many tokens to it for a forward KL, and the sampled one for a reverse KL.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    module = import_module("trl.experimental.async_distillation.async_distillation_trainer")
    ids, logprobs = inputs.teacher_topk_tokens, inputs.teacher_topk_logprobs
    total, *_ = module._chunked_jsd_loss(
        *(inputs.hidden, inputs.shared_weight, None, 1.0, None),  # no bias, scale, softcap
        *(ids, logprobs, torch.ones_like(ids, dtype=torch.bool)),
        beta=BETA["rkl"],
        temperature=1.0,
        add_tail_bucket=True,
        teacher_id_idx=None,
        num_teachers=0,
        chunk_size=module._CHUNKED_LM_HEAD_CHUNK_SIZE,
    )
    return total / inputs.shape.N


PROVIDERS = (
    Provider(
        name="TRL",
        package="trl",
        settings=tuple({"chunk_size": width} for width in VOCABULARY_TILES),
        score=_score,
        divergence=_divergence,
        token_divergence=True,
        topk_divergence=_topk_divergence,
        refused={"GRPO, head adapter": "its trainer refuses an adapter on the head"},
    ),
)
