"""Copies tensors between CPU and GPU so that the host waits for the GPU as seldom as it can."""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)

BUCKET_BYTES = 1 << 27
"""Bytes of each of the two buckets of pinned memory that copies of weights come through."""


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


def host_copies(
    tensors: Iterable[tuple[K, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[K, Tensor]]:
    """Yield tensors in CPU memory and another dtype, in any order; the host waits once a bucket.

    Tensors of a GPU are rounded there. They come through two buckets in turn, whatever their size:
    the host empties one while the GPU fills the other. So besides the copies there are 2 *
    BUCKET_BYTES of pinned memory, which PyTorch keeps for the next call, and on the GPU one bucket.
    A tensor of CPU memory that is in this dtype is not copied.
    """
    buckets: list[_Bucket[K]] = []
    for key, tensor in tensors:
        if tensor.device.type != "cuda":
            yield key, tensor.to("cpu", dtype).contiguous()
            continue
        buckets = buckets or [_Bucket(dtype), _Bucket(dtype)]
        copy = torch.empty(tensor.shape, dtype=dtype)
        source, target = tensor.reshape(-1), copy.view(-1)
        while len(source):
            if not buckets[0].room:
                buckets.reverse()
                yield from buckets[0].emptied()
            size = min(len(source), buckets[0].room)
            buckets[0].fill(source[:size], target[:size])
            source, target = source[size:], target[size:]
        buckets[0].ends.append((key, copy))
    for bucket in reversed(buckets):
        yield from bucket.emptied()


class _Bucket(Generic[K]):
    """Holds pinned memory that a GPU copies into, and where what it holds belongs."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.memory = torch.empty(BUCKET_BYTES // dtype.itemsize, dtype=dtype, pin_memory=True)
        self.room = len(self.memory)
        self.targets: list[Tensor] = []
        self.ends: list[tuple[K, Tensor]] = []
        """The copies whose last part is in here."""
        self.copied = torch.cuda.Event()

    def fill(self, source: Tensor, target: Tensor) -> None:
        """Begin to copy [n] of the GPU's memory, for which there is room, and do not wait."""
        start = len(self.memory) - self.room
        part = self.memory[start : start + len(source)]
        part.copy_(source.to(part.dtype), non_blocking=True)
        with torch.cuda.device(source.device):
            self.copied.record()
        self.room -= len(source)
        self.targets.append(target)

    def emptied(self) -> Iterator[tuple[K, Tensor]]:
        """Wait for the GPU, copy all parts to where they belong, and yield the copies that end."""
        if self.targets:
            self.copied.synchronize()
            parts = self.memory.split([*map(len, self.targets), self.room])
            for target, part in zip(self.targets, parts, strict=False):
                target.copy_(part)
        ends, self.targets, self.ends, self.room = self.ends, [], [], len(self.memory)
        yield from ends
