"""Row work of one chunk: statistics of logits, coefficients, logits into gradients.

Two modules with the same four names: `torch` (any device) and `triton` (GPU). Maths: README.md.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stream:
    """Logits [C, V] of one head, as the GEMM left them, and what turns them into z.

    z = softcap(logits) / temperature. `activate_` may replace logits by z; `sweep` and
    `gradient_` of the same module expect what it leaves.
    """

    logits: Tensor
    temperature: float | Tensor
    softcap: float | None


@dataclass(frozen=True, slots=True)
class Stats:
    """What one sweep over a stream, or two, finds out per row: [C], in nats.

    log p_v = (z_v - max) - log_sum. Their sum, the usual lse, would lose 1e-3 at |z| = 1e4.
    """

    max: Tensor
    """max_v z_v."""
    log_sum: Tensor
    """log(sum_v exp(z_v - max))."""
    logprobs: Tensor
    entropy: Tensor | None = None
    teacher_max: Tensor | None = None
    teacher_log_sum: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    kl: Tensor | None = None
    """KL(p‖q) for "rkl", KL(q‖p) for "fkl"."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Derivatives of the weighted loss of each row, [C]; None where the loss has no such term."""

    logprobs: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None


def load(impl: str) -> ModuleType:
    """The row module of an implementation; Triton is imported only when it is asked for."""
    return import_module(f"{__name__}.{impl}")
