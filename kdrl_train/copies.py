"""Copies tensors between CPU and GPU so that the host waits for the GPU as seldom as it can."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor of CPU memory to a device; the host does not wait for a GPU.

    It would without pinned memory: for all that is queued on the GPU, where the copy is large.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Copy tensors of one device to CPU memory; the host waits once for those of one dtype."""
    host = {name: tensor for name, tensor in tensors.items() if tensor.device.type == "cpu"}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        group = {k: x for k, x in tensors.items() if k not in host and x.dtype == dtype}
        if group:
            sizes = [tensor.numel() for tensor in group.values()]
            parts = torch.cat([tensor.flatten() for tensor in group.values()]).cpu().split(sizes)
            host |= {k: x.view(group[k].shape) for k, x in zip(group, parts, strict=True)}
    return {name: host[name] for name in tensors}
