"""The one tolerance rule of this project, and the derived floor under it.

One float32 run says little about what float32 loses: with few elements its error may by luck be far
below the rounding of its sums, and another processor adds them in another order. So the reference
also runs in float64 with the rounding of float32 added to each operation at random (Monte Carlo
arithmetic, Parker 1997): an elementwise result moves by u · |result| and a sum of n terms by
u · sqrt(n) · sum|terms|, u = 2^-24, the length and size of that sum: errors of random signs grow
with sqrt(n) (Higham and Mary 2019, doi:10.1137/18M1226312). What comes out is each output's floor.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNIT = 2.0**-24
"""Unit roundoff of float32: the largest relative error of rounding to it."""
DRAWS = 4
"""Runs with rounding at random; the largest error counts."""
aten = torch.ops.aten
EXACT = (aten.clone, aten.copy_, aten._to_copy, aten.where)
"""Elementwise operations that round nothing."""


def assert_matches(
    ours: Mapping[str, Tensor],
    reference: Callable[[torch.dtype], Mapping[str, Tensor]],
    size: Callable[[Mapping[str, Tensor]], Mapping[str, float]] = lambda _: {},
) -> None:
    """Assert error <= 2 max(eager error, floor) + eps for each tensor, relative to max|exact|.

    exact is the reference in float64. eager is the reference in float32, rounded to the dtype of
    ours: what plain PyTorch would have returned. Factor 2: FlashAttention's test rule. eps, of the
    dtype of ours: one rounding.

    Args:
        ours: outputs and gradients under test, by name.
        reference: computes the same names with its inputs cast to a dtype.
        size: exact results -> what stands for max|exact|, for sums whose terms cancel.
    """
    exact, eager = reference(torch.float64), reference(torch.float32)
    assert ours.keys() == exact.keys(), f"{sorted(ours)}, {sorted(exact)}"
    sizes = size(exact)
    floors = rounding_floors(reference, exact, sizes)
    for name, value in ours.items():
        rounded = eager[name].to(value.dtype)
        eager_error = relative_error(rounded, exact[name], sizes.get(name))
        error = relative_error(value, exact[name], sizes.get(name))
        budget = 2 * max(eager_error, floors[name]) + torch.finfo(value.dtype).eps
        parts = f"eager {eager_error:.2e}, floor {floors[name]:.2e}"
        message = f"{name}: error {error:.2e}, budget {budget:.2e} ({parts})"
        assert error <= budget, message  # nan fails here


def relative_error(value: Tensor, exact: Tensor, size: float | None = None) -> float:
    """max|value - exact| / max|exact| where exact is finite; infinities must agree.

    size stands for max|exact| where exact is a sum whose terms cancel: the sum of their sizes.
    """
    assert value.shape == exact.shape, f"{value.shape}, {exact.shape}"
    value, exact = value.cpu().double(), exact.cpu().double()
    infinite = exact.isinf()
    assert torch.equal(value[infinite], exact[infinite]), "infinities differ"
    error = (value - exact)[~infinite].abs()
    if not error.numel():
        return 0.0
    size = exact[~infinite].abs().max().item() if size is None else size
    return error.max().item() / size if size else float(error.max() > 0)


def rounding_floors(
    reference: Callable[[torch.dtype], Mapping[str, Tensor]],
    exact: Mapping[str, Tensor],
    sizes: Mapping[str, float],
) -> dict[str, float]:
    """The relative error that float32's rounding gives each output; 0 where exact is 0 itself."""
    floors = dict.fromkeys(exact, 0.0)
    for draw in range(DRAWS):
        with Float32Rounding(draw):
            rounded = reference(torch.float64)
        for name, value in exact.items():
            if value.any():
                error = relative_error(rounded[name], value, sizes.get(name))
                floors[name] = max(floors[name], error)
    return floors


class Float32Rounding(TorchDispatchMode):
    """Adds the rounding of float32, with random signs, to every operation in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.signs = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, then move its result where rounding would."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float64:
            size = _rounding_size(func, out, args)
            if size is not None:
                signs = torch.randint(0, 2, out.shape, generator=self.signs) * 2 - 1
                out += (signs.to(out.device) * UNIT * size).nan_to_num(0.0, 0.0, 0.0)
        return out


def _rounding_size(func: Any, out: Tensor, args: tuple) -> Tensor | None:
    """What an operation rounds relative to: |out|, or sqrt(n) · sum|terms| of a sum of n.

    None for what rounds nothing: views, copies, choices, indexing, filling.
    """
    op, size = func.overloadpacket, None
    if op in (aten.mm, aten.bmm, aten.mv, aten.dot):
        size = (args[0].abs() @ args[1].abs()) * args[0].shape[-1] ** 0.5
    elif op is aten.addmm:
        size = args[0].abs() + (args[1].abs() @ args[2].abs()) * args[1].shape[-1] ** 0.5
    elif op in (aten.sum, aten.mean):
        n = max(args[0].numel() // max(out.numel(), 1), 1)
        size = op(args[0].abs(), *args[1:]) * n**0.5
    elif op in (aten._log_softmax, aten.logsumexp):  # log of a sum: its relative error, absolute
        dim = args[1] if isinstance(args[1], int) else args[1][0]
        size = out.abs() + args[0].shape[dim] ** 0.5
    elif op is aten._log_softmax_backward_data:
        grad, output, dim = args[:3]
        total = grad.abs().sum(dim, keepdim=True) * grad.shape[dim] ** 0.5
        size = grad.abs() + output.exp() * total
    elif torch.Tag.pointwise in func.tags and op not in EXACT:
        size = out.abs()
    return size
