"""The one tolerance rule of this project."""

import torch
from torch import Tensor

SIBLINGS = 4
"""Problems of the same kind that say how far plain PyTorch is off: on one it may be lucky."""


def relative_error(found: Tensor, exact: Tensor, size: float | None = None) -> float:
    """max|found - exact| / max|exact| where exact is finite; infinities must agree.

    size stands for max|exact| where exact is a sum whose terms cancel: the sum of their sizes.
    """
    assert found.shape == exact.shape, f"{found.shape}, {exact.shape}"
    found, exact = found.cpu().double(), exact.cpu().double()
    infinite = exact.isinf()
    assert torch.equal(found[infinite], exact[infinite]), "infinities differ"
    error = (found - exact)[~infinite].abs()
    if not error.numel():
        return 0.0
    size = exact[~infinite].abs().max().item() if size is None else size
    return error.max().item() / size if size else float(error.max() > 0)


def assert_within_budget(name: str, error: float, eager_errors: list[float], eps: float) -> None:
    """error <= 2 max(eager_errors) + eps, all relative to max|exact|; exact is float64.

    eager: the reference in float32, rounded to the dtype of ours: what plain PyTorch would have
    returned. Factor 2: FlashAttention's test rule. eps, of the dtype of ours: one rounding.
    """
    budget = 2 * max(eager_errors) + eps
    assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"  # nan fails here
