"""FSDP2: a policy or teacher over all ranks, one shard of every weight each.

Every layer is a unit that is gathered when it computes. What is left (embedding, last norm, LM
head) is the root's, gathered when the policy's forward begins, so that the loss inside it sees the
whole head. Weights are float32 where the optimizer sees them, in the compute dtype where they
compute; gradients are averaged over ranks in float32.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from kdrl_train.model.policy import HeadedModel
from kdrl_train.ranks import World

T = TypeVar("T")


def shard(
    wrapped: HeadedModel, device: torch.device, world: World, *, offload: bool = False
) -> None:
    """Shard a policy or teacher in place, over all ranks of the process group.

    One unit after the other is sent out whole and cut: a device holds its shards and one unit.

    Args:
        wrapped: with its weights in CPU memory on rank 0, on the meta device elsewhere.
        device: where it computes.
        offload: shards (of a policy also gradients and AdamW's moments) wait in CPU memory.
    Raises: ValueError for a model that does not name its layers.
    """
    dtypes = world.on_main(lambda: {name: t.dtype for name, t in _tensors(wrapped)})
    mesh = init_device_mesh(device.type, (world.size,))
    precision = MixedPrecisionPolicy(
        param_dtype=wrapped.compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the normaliser is a float64 tensor, and stays one
    )
    place = CPUOffloadPolicy() if offload else OffloadPolicy()
    names = {id(tensor): name for name, tensor in _tensors(wrapped)}
    done: set[nn.Module] = set()
    for unit in [*layers(wrapped.model), wrapped]:
        own = [module for module in unit.modules() if module not in done]
        done.update(own)
        _receive(own, lambda tensor: dtypes[names[id(tensor)]], device, world)
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=place)
    wrapped.device = device
    register_fsdp_forward_method(wrapped, "call")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and buffer; a tied one once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _receive(
    modules: list[nn.Module],
    dtype_of: Callable[[Tensor], torch.dtype],
    device: torch.device,
    world: World,
) -> None:
    """Put rank 0's parameters and buffers of some modules, whole, on the device of every rank; tied
    ones stay so."""
    received: dict[int, Tensor] = {}
    for module in modules:
        kinds: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in kinds:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in received:
                    here = torch.empty(tensor.shape, dtype=dtype_of(tensor), device=device)
                    if world.main:
                        here.copy_(tensor.detach())
                    dist.broadcast(here, src=0)
                    if isinstance(tensor, nn.Parameter):
                        here = nn.Parameter(here, requires_grad=tensor.requires_grad)
                    received[id(tensor)] = here
                tensors[name] = received[id(tensor)]


def call_gathered(wrapped: HeadedModel, question: Callable[[HeadedModel], T]) -> T:
    """question(wrapped), with what lies outside the layers gathered as in its forward. Where it is
    sharded all ranks ask together."""
    try:
        return wrapped.call(question)
    finally:
        if isinstance(wrapped, FSDPModule):
            wrapped.reshard()


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
