"""linear_logprobs as autograd: log-probability and entropy for a loss that is not known yet.

Forward keeps two numbers a row; backward projects each chunk again (4u in all, u = 2NHV FLOP).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdrl_kernels.head import Head
from kdrl_kernels.one_pass import Chunks, Gradients, Needs, needs_gradient, scaled
from kdrl_kernels.rows import Coefficients, Stats


class LinearLogprobs(torch.autograd.Function):
    """hidden, weight, bias -> logprobs [N], entropy [N] or None. Saves inputs and 2 N numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        tokens: Tensor,
        entropy: bool,
        impl: str,
        workspace_bytes: int | None,
        needs: Needs,
    ) -> tuple[Tensor, Tensor | None]:
        chunks = Chunks(head, len(weight), 1, impl, workspace_bytes)
        found = [
            chunks.work.sweep(chunks.project(head, rows), tokens[rows], entropy=entropy)
            for rows in chunks
        ]
        logprobs = torch.cat([stats.logprobs for stats in found])
        entropies = torch.cat([stats.entropy for stats in found]) if entropy else None
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            tokens,
            torch.cat([stats.max for stats in found]),
            torch.cat([stats.log_sum for stats in found]),
            entropies,
        )
        ctx.settings = head.temperature, head.softcap, impl, workspace_bytes, needs
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_logprobs.device.type, enabled=False):
            return LinearLogprobs._gradients(ctx, grad_logprobs, grad_entropy)

    @staticmethod
    def _gradients(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, top, log_sum, entropy = ctx.saved_tensors
        temperature, softcap, impl, workspace_bytes, needs = ctx.settings
        head = Head(hidden, weight, bias, temperature, softcap)
        chunks = Chunks(head, len(weight), 1, impl, workspace_bytes)
        gradients = Gradients(head, needs)
        unit = _unit(hidden.dtype, grad_logprobs, grad_entropy)
        for rows in chunks:
            part = None if entropy is None else entropy[rows]
            stats = Stats(top[rows], log_sum[rows], logprobs=top[rows], entropy=part)
            coef = Coefficients(
                grad_logprobs[rows] / unit,
                None if grad_entropy is None else grad_entropy[rows] / unit,
            )
            dz = chunks.work.gradient_(
                chunks.project(head, rows), tokens[rows], stats, coef, dtype=hidden.dtype
            )
            gradients.add(head, rows, dz)
        found = (scaled(gradient, unit, hidden.dtype) for gradient in gradients.tensors())
        return *found, None, None, None, None, None, None


def _unit(dtype: torch.dtype, *gradients: Tensor | None) -> Tensor:
    """0-d divisor of the coefficients: keeps float16 logit gradients clear of 6e-8; else 1."""
    present = [gradient for gradient in gradients if gradient is not None]
    if dtype != torch.float16 or not len(present[0]):
        return present[0].new_ones(())
    largest = torch.stack([gradient.abs().amax() for gradient in present]).amax()
    return torch.where(largest > 0, largest, 1)


def linear_logprobs(
    head: Head, tokens: Tensor, entropy: bool, impl: str, workspace_bytes: int | None
) -> tuple[Tensor, Tensor | None]:
    """(logprobs [N], entropy [N] or None), differentiable once in hidden, weight and bias."""
    result: tuple[Tensor, Tensor | None] = LinearLogprobs.apply(
        head.hidden,
        head.weight,
        head.bias,
        head,
        tokens,
        entropy,
        impl,
        workspace_bytes,
        needs_gradient(head),
    )
    return result
