"""FSDP2: a policy or teacher over all ranks, one shard of every weight each.

Every layer is a unit that is gathered when it computes. What is left (embedding, last norm, LM
head) is the root's, gathered when the policy's forward begins, so that the loss inside it sees the
whole head. Weights are float32 where the optimizer sees them, in the compute dtype where they
compute; gradients are averaged over ranks in float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from kdrl_train.policy import HeadedModel


def shard(wrapped: HeadedModel, *, offload: bool = False) -> None:
    """Shard a policy or teacher in place, over all ranks of the process group.

    Args:
        wrapped: on its device, the same weights on every rank.
        offload: shards (of a policy also gradients and AdamW's moments) wait in CPU memory.
    Raises: ValueError for a model that does not name its layers.
    """
    device = wrapped.model.device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    precision = MixedPrecisionPolicy(
        param_dtype=wrapped.compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the normaliser is a float64 tensor, and stays one
    )
    place = CPUOffloadPolicy() if offload else OffloadPolicy()
    for layer in layers(wrapped.model):
        fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=place)
    fully_shard(wrapped, mesh=mesh, mp_policy=precision, offload_policy=place)


def layers(model: Any) -> list[nn.Module]:
    """The blocks of a transformers model, by the class names that it declares for sharding."""
    names = set(model._no_split_modules or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ValueError(
            f"the model must name its layers in _no_split_modules, got {type(model).__name__} with "
            f"{sorted(names) or 'none'}: it cannot be sharded, start it without torchrun"
        )
    return found


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank (a collective); a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(wrapped: HeadedModel) -> None:
    """Let go of the root's gathered weights after a forward without a backward pass, which would
    have: the next one would not see what the optimiser does in between."""
    if isinstance(wrapped, FSDPModule):
        wrapped.reshard()


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight) of every parameter, one at a time; every rank must take all of them."""
    for name, parameter in model.named_parameters():
        yield name, full(parameter.detach())
