"""Provides flash-linear-attention: its two losses fused with the head, in chunks of rows."""

from importlib import import_module

from torch import Tensor

from bench.inputs import Inputs
from bench.providers import Provider

ONE_DIRECTION = "its divergence is KL(teacher‖student) alone"
NOT_CLIPPED = "its GRPO loss takes logits, and no old log-probabilities"


def _divergence(inputs: Inputs, kd: str, accumulate_grad_in_fp32: bool, **_: int) -> Tensor:
    """Return the 0-d mean over rows: its "batchmean" sums over the vocabulary, too."""
    assert kd == "fkl"
    heads = inputs.shared_weight, inputs.shared_teacher_weight
    module = import_module("fla.modules.fused_kl_div")
    loss = module.FusedKLDivLoss("batchmean", accumulate_grad_in_fp32)
    return loss(inputs.hidden, inputs.teacher_hidden, *heads)


def _cross_entropy(inputs: Inputs, num_chunks: int, accumulate_grad_in_fp32: bool) -> Tensor:
    module = import_module("fla.modules.fused_linear_cross_entropy")
    loss = module.FusedLinearCrossEntropyLoss(
        num_chunks=num_chunks, accumulate_grad_in_fp32=accumulate_grad_in_fp32
    )
    return loss(inputs.hidden, inputs.tokens, inputs.shared_weight)


PROVIDERS: tuple[Provider, ...] = (
    Provider(
        name="flash-linear-attention",
        package="flash-linear-attention",
        gpu_only="Triton kernels",
        # its default first; the float32 sum of dW is a float32 GEMM. The divergence has 8 chunks.
        settings=tuple(
            {"num_chunks": chunks, "accumulate_grad_in_fp32": wide}
            for wide in (True, False)
            for chunks in (8, 2)
        ),
        divergence=_divergence,
        cross_entropy=_cross_entropy,
        refused={
            "rkl": ONE_DIRECTION,
            "jsd": ONE_DIRECTION,
            "GRPO": NOT_CLIPPED,
            "GRPO, half at 0": NOT_CLIPPED,
            "GRPO, frozen head": NOT_CLIPPED,
        },
    ),
)
