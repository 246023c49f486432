"""How far a call is from float64, and who may be timed.

Errors are relative to the largest exact number: max|found - exact| / max|exact|. Ours must stay
within twice the error of plain float32 PyTorch on the same inputs plus one rounding. Others are
marked as different beyond DIFFERS, which is meant to tell another formula from coarser rounding.
"""

import math

import torch
from torch import Tensor

from bench import definition
from bench.inputs import Inputs
from bench.ops import Op
from bench.providers import Outputs

DIFFERS = 0.05
EXACT_ROWS = 256
"""Rows of float64 logits held at a time."""
SAMPLE = 1 << 18
"""At most so many numbers have their quantile taken: evenly spaced ones of a larger tensor."""

Errors = dict[str, dict[str, float]]


def exact(inputs: Inputs, op: Op) -> Outputs:
    """Outputs and gradients in float64."""
    outputs, gradients = definition.by_rows(inputs, op, torch.float64, EXACT_ROWS)
    return outputs | gradients


def with_gradients(outputs: Outputs, inputs: Inputs, op: Op) -> Outputs:
    """Outputs of a call whose backward pass is done, and the gradients that it left."""
    found = {name: value.detach() for name, value in outputs.items()}
    for name in op.gradients:
        gradient = getattr(inputs, name).grad
        if gradient is not None:
            found[f"d{name}"] = gradient
    return found


def errors(found: Outputs, truth: Outputs) -> Errors:
    """{quantity: {"max", "p999"}} of everything found that the definition has.

    The loss is a mean that may cancel: its error is relative to at least 1 nat.
    """
    result = {}
    for name in truth.keys() & found.keys():
        size = truth[name].abs().max().item()
        gap = (found[name].double() - truth[name]).abs().flatten()
        gap /= max(size, 1.0) if name == "loss" else size
        result[name] = {"max": gap.max().item(), "p999": _quantile(gap)}
    return dict(sorted(result.items()))


def difference(found: Outputs, truth: Outputs, found_errors: Errors, op: Op) -> str | None:
    """Why this is not the same operation, in words; None if it is."""
    missing = [f"d{name}" for name in op.gradients if f"d{name}" not in found]
    missing += [name for name in ("loss", "entropy") if name in truth and name not in found]
    if missing:
        return f"differs: no {' and no '.join(missing)}"
    worst = max(found_errors, key=lambda name: _sortable(found_errors[name]["max"]))
    error = found_errors[worst]["max"]
    return None if error <= DIFFERS else f"differs: {worst} is off by {error:.1%} of its largest"


def beyond_budget(
    found: Outputs, found_errors: Errors, truth: Outputs, inputs: Inputs, op: Op
) -> str | None:
    """Why our own result is not good enough to have a speed; None if it is."""
    outputs, gradients = definition.by_rows(inputs, op, torch.float32, EXACT_ROWS)
    eager = {name: v for name, v in (outputs | gradients).items() if name in found}
    plain = errors({name: v.to(found[name].dtype) for name, v in eager.items()}, truth)
    for name, error in found_errors.items():
        budget = 2 * plain[name]["max"] + torch.finfo(found[name].dtype).eps
        if not error["max"] <= budget:
            return f"differs: error of {name} {error['max']:.1e}, budget {budget:.1e}"
    return None


def _quantile(gap: Tensor) -> float:
    step = -(-gap.numel() // SAMPLE)
    return gap[::step].quantile(0.999).item()


def _sortable(error: float) -> float:
    return math.inf if math.isnan(error) else error
