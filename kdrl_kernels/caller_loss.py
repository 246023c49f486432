"""Takes a caller's own loss of each token, whose coefficients come by autograd."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kdrl_kernels.objective import Divergence, Objective
from kdrl_kernels.plain import is_read
from kdrl_kernels.token_rows import Coefficients, Rows

NO_GRADIENT = (
    "loss_fn must return losses that depend on rows.logprobs, rows.entropy, rows.lse, rows.kl, "
    "rows.forward_kl, rows.extra_logprobs or rows.rest_logprob with a gradient, got constants"
)
OTHER_GRADIENT = (
    "loss_fn must read no tensor that needs a gradient, besides rows, got one of shape {}, which "
    "would get none: detach it, or take linear_logprobs, whose outputs may meet any parameter"
)
OTHER_ROWS = (
    "loss_fn must compute the loss of a row from that row alone, since the chunk plan decides "
    "which rows come together, got one with a gradient in other rows ({}), or a backward that is "
    "not linear in its gradient: compute what needs several rows before the call, or take "
    "linear_logprobs, whose outputs may meet in any loss"
)
COEFFICIENTS = {"extra_logprobs": "extra", "rest_logprob": "rest"}
"""The fields of Coefficients whose names are not those of Rows."""


@dataclass(frozen=True, slots=True)
class CallerLoss:
    """Holds a caller's own loss of each token, in the place of an Objective."""

    fn: Callable[[Rows], Tensor]
    exact_kd: Divergence | None
    jsd_alpha: float
    entropy: bool
    lse: bool = False
    teacher_entropy: bool = False
    positions: Tensor | None = None
    """[N] int64, passed through to rows.positions."""

    def losses(self, rows: Rows) -> Tensor:
        """Return the [C] losses of the caller, after checks of their type and shape."""
        try:
            losses = self.fn(rows)
        except (TypeError, AttributeError) as error:  # what None raises
            names = [field.name for field in fields(rows) if getattr(rows, field.name) is None]
            error.add_note(
                f"rows has None for what no option of this call sets: {', '.join(names)}"
            )
            raise
        if not isinstance(losses, Tensor):
            remedy = ": a field of rows is None unless its option is passed (entropy=True, kl=...)"
            raise TypeError(
                f"loss_fn must return a tensor, got {type(losses).__name__}"
                f"{remedy if losses is None else ''}"
            )
        if losses.shape != rows.logprobs.shape:
            raise ValueError(
                f"loss_fn must return one loss a row, [C] with C = {len(rows.logprobs)}, "
                f"got {list(losses.shape)}"
            )
        return losses.to(rows.logprobs.dtype)


TokenLoss = Objective | CallerLoss


def coefficients(
    loss: TokenLoss, rows: Rows, weights: Tensor
) -> tuple[Tensor, Coefficients | None]:
    """Return [C] weighted losses and, by autograd, their derivatives (None for constants)."""
    names = ["logprobs"]
    names += ["entropy"] if loss.entropy else []
    optional = ("kl", "forward_kl", "lse", "extra_logprobs", "rest_logprob")
    names += [name for name in optional if getattr(rows, name) is not None]
    leaves = {name: getattr(rows, name).detach().requires_grad_() for name in names}
    with torch.enable_grad():
        losses = weights * loss.losses(replace(rows, **leaves))
        if not losses.requires_grad:
            return losses, None
        refuse_other_leaves(losses, list(leaves.values()))
        checked = isinstance(loss, CallerLoss) and is_read(rows.logprobs)
        inputs = list(leaves.values())
        grads = torch.autograd.grad(losses.sum(), inputs, allow_unused=True, retain_graph=checked)
        if checked:
            refuse_other_rows(losses, leaves, grads)
    if all(grad is None for grad in grads):
        return losses.detach(), None
    derivatives = {
        COEFFICIENTS.get(name, name): torch.zeros_like(leaves[name]) if grad is None else grad
        for name, grad in zip(names, grads, strict=True)
    }
    return losses.detach(), Coefficients(**derivatives)


def refuse_other_rows(
    losses: Tensor, leaves: dict[str, Tensor], grads: Sequence[Tensor | None]
) -> None:
    """Raise where the gradient of a row comes from the losses of other rows.

    It is linear in what autograd gets for each loss: with a power of two for each row, which has no
    pattern, the gradient of each row is its own times that power, to the bit.

    Args:
        losses: [C], whose graph is still there.
        leaves: what the losses were computed from, by name, [C] or [C, K].
        grads: the derivatives of the sum of the losses in the leaves.
    """
    numbers = torch.arange(len(losses), device=losses.device)
    factors = (2.0 ** ((numbers * 2654435761 >> 16) % 8)).to(losses.dtype)
    others = torch.autograd.grad(losses, list(leaves.values()), factors, allow_unused=True)
    for (name, leaf), grad, other in zip(leaves.items(), grads, others, strict=True):
        if grad is None or other is None:
            continue
        expected = grad * factors.view(-1, *[1] * (leaf.ndim - 1))
        room = 1e-6 * expected.abs() + 1e-30  # of numbers so small that they have fewer digits
        if bool(((other - expected).abs() > room).any()):
            raise ValueError(OTHER_ROWS.format(f"rows.{name}"))


def refuse_other_leaves(losses: Tensor, leaves: list[Tensor]) -> None:
    """Raise where losses depend on a leaf of the graph that is none of these: on a parameter."""
    left, seen = [losses.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only a node that ends in a leaf has one
        if variable is not None and not any(variable is leaf for leaf in leaves):
            raise ValueError(OTHER_GRADIENT.format(list(variable.shape)))
        left += [following for following, _ in node.next_functions]
