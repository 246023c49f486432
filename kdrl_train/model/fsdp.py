"""Shards a policy or teacher with FSDP2: each rank keeps one shard of every weight.

Every layer is a unit, whose weights are gathered when it computes. The remaining weights
(embedding, last norm, LM head) belong to the root, and are gathered when the policy's forward pass
begins, so that the loss inside it sees the whole head. Weights are float32 where the optimizer sees
them, and in the compute dtype where they compute; gradients are averaged over ranks in float32.

With model.tensor_parallel the ranks form a mesh [data, tensor]. A unit is first split over the
ranks of `tensor`, which are neighbours, and each part is then sharded over those of `data`. The
loss then sees this rank's rows of the head.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from kdrl_train.model import lora
from kdrl_train.model.policy import HeadedModel
from kdrl_train.model.tensor_parallel import split, styles_of
from kdrl_train.ranks import World


def shard(
    wrapped: HeadedModel, device: torch.device, world: World, *, offload: bool = False
) -> None:
    """Shard a policy or teacher in place, over all ranks of the process group.

    Where world.tensor > 1 its layers and its head are split too (tensor_parallel.py).

    Rank 0 sends one unit after the other to all ranks, each of which keeps its part: a device
    never holds more than its shards and one whole unit.

    Args:
        wrapped: the model, with its weights in CPU memory on rank 0, on the meta device elsewhere.
        device: the device that computes.
        offload: whether the shards (of a policy also its gradients and AdamW's moments) stay in
            CPU memory while they are not used.
    Raises: ValueError for a model that does not name its layers, or that cannot be split.
    """
    styles = styles_of(wrapped.model, world.tensor) if world.tensor > 1 else {}
    dtypes = world.on_main(lambda: {name: t.dtype for name, t in _tensors(wrapped)})
    mesh, tensor_mesh = _meshes(device, world)
    precision = MixedPrecisionPolicy(
        param_dtype=wrapped.compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the normaliser is a float64 tensor, and stays one
    )
    offload_policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    names = {id(tensor): name for name, tensor in _tensors(wrapped)}
    sent: set[nn.Module] = set()
    for unit in [*layers(wrapped.model), wrapped]:
        modules = [module for module in unit.modules() if module not in sent]
        sent.update(modules)
        _receive(modules, lambda tensor: dtypes[names[id(tensor)]], device, world)
        if tensor_mesh is not None:
            split(modules, styles, tensor_mesh)
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload_policy)
    wrapped.device = device
    if tensor_mesh is not None:
        wrapped.vocab_group = tensor_mesh.get_group()
    register_fsdp_forward_method(wrapped, "call")


def _meshes(device: torch.device, world: World) -> tuple[DeviceMesh, DeviceMesh | None]:
    """Return the mesh over which FSDP2 shards, and that of tensor parallelism, if there is one."""
    if world.tensor == 1:
        return init_device_mesh(device.type, (world.size,)), None
    shape = (world.data_size, world.tensor)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
    mesh._flatten()  # so that a norm over both dimensions is one all-reduce, the same on all ranks
    # of a weight that is sharded twice it warns, on every rank, that it is gathered in two steps
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    return mesh["data"], mesh["tensor"]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every parameter and buffer; a tied one comes once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _receive(
    modules: list[nn.Module],
    dtype_of: Callable[[Tensor], torch.dtype],
    device: torch.device,
    world: World,
) -> None:
    """Put rank 0's parameters and buffers of some modules, whole, on the device of every rank.

    Tied tensors stay tied.
    """
    received: dict[int, Tensor] = {}
    for module in modules:
        kinds: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in kinds:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in received:
                    copy = torch.empty(tensor.shape, dtype=dtype_of(tensor), device=device)
                    if world.main:
                        copy.copy_(tensor.detach())
                    dist.broadcast(copy, src=0)
                    if isinstance(tensor, nn.Parameter):
                        copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
                    received[id(tensor)] = copy
                tensors[name] = received[id(tensor)]


@contextmanager
def gathered(wrapped: HeadedModel) -> Iterator[None]:
    """Keep the weights outside the layers whole within the block, as in the forward pass.

    A layer gathers its own weights when it computes. Where the model is sharded, all ranks must
    enter the block together and run the same layers in it, without gradients.
    """
    # An empty forward pass makes FSDP2 take `wrapped` for the root and gather its weights. After
    # unshard() alone the first layer to run would become a root, and training would fail.
    wrapped.call(_do_nothing)
    try:
        yield
    finally:
        reshard(wrapped)


def _do_nothing(_wrapped: HeadedModel) -> None:
    """Compute nothing."""


def layers(model: Any) -> list[nn.Module]:
    """Return the blocks of a transformers model, by the class names it declares for sharding.

    Raises: ValueError for a model that declares none.
    """
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"the model must name its layers in _no_split_modules, got {type(model).__name__} with "
            f"{sorted(names) or 'none'}: it cannot be sharded, start it without torchrun"
        )
    return blocks


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, on every rank (a collective); a plain one unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(wrapped: HeadedModel) -> None:
    """Free the root's gathered weights after a forward pass that no backward pass follows.

    Otherwise the next forward pass would reuse them and miss the optimiser steps in between.
    """
    if isinstance(wrapped, FSDPModule):
        wrapped.reshard()


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole weight) of every parameter, one at a time; adapters come merged into the
    weights beside them, under the names of the model without adapters.

    Where the model is sharded, every rank must take all of them.
    """
    layers = lora.adapted(model)
    for name, parameter in model.named_parameters():
        plain = lora.plain_name(name, layers)
        if plain is None:
            continue
        weight, owner = full(parameter.detach()), plain.rpartition(".")[0]
        if owner in layers and plain == f"{owner}.weight":
            layer = layers[owner]
            parts = (full(part[lora.ADAPTER].weight) for part in (layer.lora_A, layer.lora_B))
            weight = lora.merged(layer, weight, *parts)
        yield plain, weight
