"""Measures how far a call is from float64, and decides which provider may be timed.

Errors are relative to the largest exact number: max|result - exact| / max|exact|. Where gradients
are compared at a sample, `results` and `truth` hold what sample.py computes of them. Ours must stay
within twice the error of float32 PyTorch on the same inputs plus one rounding, whose logits come
from the same GEMM of 16-bit operands where the inputs have 16 bits. Others are
marked as different beyond DIFFERS, which is meant to tell another formula from coarser rounding.
The error of a sketched gradient may be of any size, and must average out over its seeds.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from bench import definition
from bench.inputs import Inputs
from bench.ops import Op
from bench.providers import Outputs
from bench.sample import PROBED, GradientSample, compute

DIFFERS = 0.05
DRAWS = 16
"""Seeds of a sketch whose gradients are averaged."""
ROUNDING = 2e-5
"""Relative error that float32 may have, the same for every seed: 3e-6 where all rows are exact."""
EXACT_ROWS = 256
"""Rows of float64 logits held at a time."""
PROBED_ROUNDINGS = 4
"""Roundings that a row times a probe may be off by: its H numbers are each rounded once, and their
errors add up as the numbers do, at random."""
QUANTILE_NUMBERS = 1 << 18
"""Most numbers of which a quantile is taken; of a larger tensor evenly spaced ones are."""

Errors = dict[str, dict[str, float]]


def exact(inputs: Inputs, op: Op, sample: GradientSample | None = None) -> Outputs:
    """Compute outputs and gradients in float64, the latter at a sample where there is one."""
    return _computed(inputs, op, sample, torch.float64, definition.plain_product)


def _computed(
    inputs: Inputs,
    op: Op,
    sample: GradientSample | None,
    dtype: torch.dtype,
    product: definition.Product,
) -> Outputs:
    if sample is not None:
        return compute(inputs, op, sample, dtype, EXACT_ROWS, product)
    outputs, gradients = definition.by_rows(inputs, op, dtype, EXACT_ROWS, product)
    return outputs | gradients


def with_gradients(outputs: Outputs, inputs: Inputs, op: Op) -> Outputs:
    """Collect the outputs of a call and the gradients that its backward pass left."""
    results = {name: value.detach() for name, value in outputs.items()}
    for name in op.gradients:
        gradient = getattr(inputs, name).grad
        if gradient is not None:
            results[f"d{name}"] = gradient
    return results


def errors(results: Outputs, truth: Outputs) -> Errors:
    """Compute {quantity: {"max", "p999"}} of all results that the definition has too.

    The loss is a mean that may cancel: its error is relative to at least 1 nat.
    """
    errors_by_name = {}
    for name in truth.keys() & results.keys():
        size = truth[name].abs().max().item()
        error = (results[name].double() - truth[name]).abs().flatten()
        error /= max(size, 1.0) if name == "loss" else size
        errors_by_name[name] = {"max": error.max().item(), "p999": _quantile(error)}
    return dict(sorted(errors_by_name.items()))


def difference(results: Outputs, truth: Outputs, measured: Errors, op: Op) -> str | None:
    """Say why the results are of another operation; None if they are right."""
    missing = [f"d{name}" for name in op.gradients if f"d{name}" not in results]
    missing += [name for name in ("loss", "entropy") if name in truth and name not in results]
    if missing:
        return f"differs: no {' and no '.join(missing)}"
    worst = max(measured, key=lambda name: _sortable(measured[name]["max"]))
    error = measured[worst]["max"]
    return None if error <= DIFFERS else f"differs: {worst} is off by {error:.1%} of its largest"


def beyond_budget(
    results: Outputs,
    measured: Errors,
    truth: Outputs,
    inputs: Inputs,
    op: Op,
    sample: GradientSample | None = None,
) -> str | None:
    """Say why our own result is too inaccurate to be timed; None if it is good enough."""
    dtype = inputs.hidden.dtype
    product = definition.plain_product
    if torch.finfo(dtype).bits < 32:
        product = partial(_narrow, dtype=dtype)
    computed = _computed(inputs, op, sample, torch.float32, product)
    eager = {name: v for name, v in computed.items() if name in results}
    plain = errors({name: v.to(results[name].dtype) for name, v in eager.items()}, truth)
    for name, error in measured.items():
        rounded = results[name.removesuffix(PROBED)]
        roundings = PROBED_ROUNDINGS if name.endswith(PROBED) else 1
        budget = 2 * plain[name]["max"] + roundings * torch.finfo(rounded.dtype).eps
        if not error["max"] <= budget:
            return f"differs: error of {name} {error['max']:.1e}, budget {budget:.1e}"
    return None


def _narrow(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    product: Tensor = definition.NarrowProduct.apply(hidden, weight, dtype)
    return product


def biased(draws: Iterable[Outputs], truth: Outputs, names: Sequence[str]) -> str | None:
    """Say which gradient is not the exact one on average over draws of a sketch; None if all are.

    The mean of n unbiased draws has 1 / sqrt(n) of the error of one, as a norm over all numbers;
    twice that passes.
    """
    sums = {name: torch.zeros_like(truth[name]) for name in names}
    squares, eps, n = dict.fromkeys(names, 0.0), ROUNDING, 0
    for draw in draws:
        n += 1
        for name in names:
            error = draw[name].double() - truth[name]
            sums[name] += error
            squares[name] += error.square().sum().item()
            eps = max(eps, torch.finfo(draw[name].dtype).eps)
    for name in names:
        size = truth[name].norm().item()
        mean, one = sums[name].norm().item() / n / size, math.sqrt(squares[name] / n) / size
        if not mean <= max(2 * one / math.sqrt(n), eps):
            errors = f"{mean:.1e} on average over {n} seeds, {one:.1e} with one"
            return f"differs: relative error of {name} {errors}"
    return None


def _quantile(errors: Tensor) -> float:
    step = -(-errors.numel() // QUANTILE_NUMBERS)
    return errors[::step].quantile(0.999).item()


def _sortable(error: float) -> float:
    return math.inf if math.isnan(error) else error
