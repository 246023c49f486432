"""Relative errors of a benchmarked call against float64, and the rule they must pass."""

import torch
from torch import Tensor

from bench.inputs import Inputs
from bench.ops import Op, clear_gradients, ours, plain
from tests.tolerance import assert_within_budget

EXACT_ROWS = 256
"""Rows of float64 logits held at a time."""


def check_accuracy(inputs: Inputs, op: Op) -> dict[str, float]:
    """{quantity: max|ours - exact| / max|exact|} of the outputs and gradients; exact is float64.

    Raises: AssertionError beyond twice the error of plain float32 PyTorch plus one rounding.
    """
    clear_gradients(inputs, op)
    found = ours(inputs, op)
    found |= {f"d{name}": getattr(inputs, name).grad for name in op.gradients}
    clear_gradients(inputs, op)
    exact, eager = (_plain(inputs, op, dtype) for dtype in (torch.float64, torch.float32))
    errors = {}
    for name, value in found.items():
        errors[name] = _relative_error(value, exact[name])
        plain_error = _relative_error(eager[name].to(value.dtype), exact[name])
        assert_within_budget(name, errors[name], [plain_error], torch.finfo(value.dtype).eps)
    return errors


def _plain(inputs: Inputs, op: Op, dtype: torch.dtype) -> dict[str, Tensor]:
    outputs, gradients = plain(inputs, op, dtype, EXACT_ROWS)
    return outputs | gradients


def _relative_error(found: Tensor, exact: Tensor) -> float:
    """Where the tensors are: tests.tolerance takes them to the CPU, too slow for a real dW."""
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()
