"""Provides liger-kernel: losses in PyTorch chunks, losses on Triton kernels, log-probabilities.

Its loss classes return one number each, the mean over tokens. They take their gradients in the
forward pass. The chunked GRPO loss keeps float32 logits and sums; the chunked divergence works in
the dtype of the hidden states (bfloat16 log-probabilities for bfloat16 inputs) and always takes
the weight's gradient; the Triton ones round the gradient of the logits to that dtype.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import definition
from bench.inputs import Inputs
from bench.machine import DEVICE
from bench.ops import Op
from bench.providers import Provider, Refusal

TRITON = "Triton kernels"
BETA = {"fkl": 0.0, "rkl": 1.0, "jsd": 0.5}
"""The teacher's share of the mixture in its Jensen-Shannon divergence."""
CHUNK_ROWS = (1024, 4096, 16384) if DEVICE == "cuda" else (64, 256)
CHUNKED = tuple({"chunk_size": rows, "compiled": True} for rows in CHUNK_ROWS)
CHUNKED += ({"chunk_size": CHUNK_ROWS[1], "compiled": False},)
BUDGETS = (1, 8)
"""Logits held by the fused cross entropy, as multiples of the hidden states' size. 1: default."""


def _chunked_policy(inputs: Inputs, op: Op, chunk_size: int, compiled: bool) -> Tensor:
    """Pass each token as a sequence of length 1, so that it has an advantage of its own."""
    column = {"old_per_token_logps": inputs.old_logprobs[:, None]} if op.old_logprobs else {}
    loss = import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        chunk_size=chunk_size,
        compiled=compiled,
        epsilon_low=definition.CLIP,
        epsilon_high=definition.CLIP,
        loss_type="grpo",
    )
    with torch._dynamo.config.patch(recompile_limit=1000):  # past it, it would run uncompiled
        value, _ = loss(
            inputs.hidden[:, None],
            inputs.shared_weight,
            inputs.tokens[:, None],
            attention_mask=torch.ones_like(inputs.advantages)[:, None],
            advantages=definition.advantages(inputs, op),
            **column,
        )
    return value


def _chunked_divergence(inputs: Inputs, kd: str, **options: Any) -> Tensor:
    """Pass the shared rows of both heads: it takes logits of 0 for rows that the student lacks."""
    student = (inputs.hidden, inputs.shared_weight)
    teacher = (inputs.teacher_hidden, inputs.shared_teacher_weight)
    loss = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[kd], **options
    )
    with torch._dynamo.config.patch(recompile_limit=1000):
        return loss(*student, *teacher, true_labels=inputs.tokens)


def _triton_policy(inputs: Inputs, op: Op) -> Tensor:
    """Compute over full logits. Each sequence has one row more than its one token."""
    logits = inputs.hidden @ inputs.shared_weight.T
    loss, _ = import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss(
        F.pad(logits[:, None], (0, 0, 0, 1)),
        old_logp=inputs.old_logprobs[:, None].contiguous() if op.old_logprobs else None,
        ref_logp=None,
        completion_ids=inputs.tokens[:, None].contiguous(),
        advantages=definition.advantages(inputs, op),
        temperature=1.0,
        beta=0.0,
        eps_low=definition.CLIP,
        eps_high=definition.CLIP,
        loss_type="grpo",
        reduce=True,
    )
    return loss


def _triton_divergence(inputs: Inputs, kd: str, **_of_score: int) -> Tensor:
    student = (inputs.hidden, inputs.shared_weight)
    teacher = (inputs.teacher_hidden, inputs.shared_teacher_weight)
    loss = import_module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(
        jsd_beta=BETA[kd]
    )
    return loss(*student, *teacher, shift_labels=None)


def _fused_kl(inputs: Inputs, _kd: str) -> Tensor:
    """Compute KL(q‖p) from the teacher's probabilities, which all exist at once."""
    with torch.no_grad():
        q = (inputs.teacher_hidden @ inputs.shared_teacher_weight.T).softmax(
            dim=1, dtype=torch.float32
        )
    loss = import_module(
        "liger_kernel.transformers.fused_linear_kl_div"
    ).LigerFusedLinearKLDivLoss()
    return loss(inputs.hidden, inputs.shared_weight, q)


def _token_cross_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, _entropy: bool, budget: int
) -> tuple[Tensor, None]:
    """Compute a loss per token; its backward pass projects again, for each token's coefficient."""
    return -_fused_cross_entropy(hidden, weight, tokens, "none", budget), None


def _mean_cross_entropy(inputs: Inputs, budget: int) -> Tensor:
    return _fused_cross_entropy(inputs.hidden, inputs.shared_weight, inputs.tokens, "mean", budget)


def _fused_cross_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, reduction: str, budget: int
) -> Tensor:
    """Call its autograd function, because its module does not pass the budget."""
    ignore_index, z_loss, smoothing = -100, 0.0, 0.0
    before = (None, None, ignore_index, z_loss, smoothing, reduction)  # no bias, no class weights
    after = (None, False, None, False, False, False, None, None)  # plain: no cap, scaling, metrics
    function = import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction
    return function.apply(hidden, weight, tokens, *before, *after, budget)[0]


def _scaled_cross_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Call a CuTe kernel on Hopper GPUs in bfloat16; elsewhere PyTorch, 512 tokens at a time."""
    hopper = hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) == (9, 0)
    if hopper and find_spec("cutlass") is None:
        raise Refusal("not supported: on a Hopper GPU it needs nvidia-cutlass-dsl")
    function = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    outputs = function.apply(hidden, weight, tokens, return_entropy=entropy)
    nll, h = outputs if entropy else (outputs, None)
    return -nll, h


def _provider(way: str, **pieces: Any) -> Provider:
    return Provider(name=f"Liger, {way}", package="liger-kernel", **pieces)


PROVIDERS = (
    _provider(
        "chunked",
        settings=CHUNKED,
        policy=_chunked_policy,
        divergence=_chunked_divergence,
    ),
    _provider(
        "Triton",
        gpu_only=TRITON,
        settings=tuple({"budget": budget} for budget in BUDGETS),
        score=_token_cross_entropy,
        cross_entropy=_mean_cross_entropy,
        divergence=_triton_divergence,
        refused={"logprob + entropy": "no entropy"},
    ),
    _provider("Triton GRPO", gpu_only=TRITON, policy=_triton_policy, divergence=_triton_divergence),
    _provider(
        "Triton KL",
        gpu_only=TRITON,
        divergence=_fused_kl,
        refused=dict.fromkeys(("rkl", "jsd"), "KL from given probabilities only"),
    ),
    _provider("scaled cross entropy", score=_scaled_cross_entropy),
)
