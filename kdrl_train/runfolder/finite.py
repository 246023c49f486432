"""Finds weights and optimiser state that are not finite, before they are saved or exported."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kdrl_train.errors import BrokenWeightsError
from kdrl_train.ranks import ALONE, World

Named = tuple[str, Tensor]


def require_finite(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    world: World = ALONE,
    dump: Callable[[], str] | None = None,
) -> None:
    """Check the weights after `step` optimiser steps, and AdamW's moments, on all ranks together.

    dump: writes what led to weights that are not finite, and returns a clause that says where.

    Raises: BrokenWeightsError, on every rank, naming the first tensor that holds NaN or inf.
    """
    names = world.share(lambda: first_broken(state_of(model, optimizer)))
    broken = next((name for name in names if name is not None), None)
    if broken is not None:
        raise BrokenWeightsError(
            f"weights and moments must be finite, got NaN or inf in {broken} after {step} steps: "
            f"they are not saved{'' if dump is None else f'; {dump()}'}. Start a "
            "new run with e.g. a lower optim.learning_rate, from an older checkpoint, if there is "
            "one, with --model.weights"
        )


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Named]:
    """Yield the weights of a model and what the optimiser keeps of each, this rank's shards."""
    named = list(model.named_parameters())
    yield from named
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{key} of {name}", value


def first_broken(named: Iterable[Named]) -> str | None:
    """Return the name of the first tensor that holds NaN or inf; None where all are finite.

    Of a sharded tensor only this rank's part is read. It costs one pass over the memory and one
    wait for each device, and no copy: a smallest and a largest number are not finite where one is
    not. (A sum of finite ones may be infinite; the norm of order inf is five times slower on CPUs.)
    """
    groups: dict[torch.device, list[Named]] = {}
    for name, tensor in named:
        part = tensor.detach()
        if isinstance(part, DTensor):
            part = part.to_local()
        if part.is_floating_point() and part.numel():
            groups.setdefault(part.device, []).append((name, part))
    for group in groups.values():
        extremes = torch.stack([torch.stack(part.aminmax()).float() for _, part in group])
        finite = extremes.isfinite().all(dim=1).tolist()
        if not all(finite):
            return group[finite.index(False)][0]
    return None
