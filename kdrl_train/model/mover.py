"""Keeps several models in CPU memory, and the one that computes on the device."""

from dataclasses import replace

import torch
from torch import Tensor, nn

import kdrl_kernels as kk


class Mover:
    """Lends the memory of a device to one of several frozen models at a time.

    Their weights never change, so a model that leaves is not copied: its tensors are again those in
    CPU memory, pinned where the device is a GPU.

    Args:
        device: where the models compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moves = 0
        """How often a model was copied to the device."""
        self._kept: dict[nn.Module, list[Tensor]] = {}
        self._present: nn.Module | None = None

    def keep(self, model: nn.Module) -> None:
        """Move a teacher to CPU memory until its forward is called.

        Raises: ValueError for quantised weights, which cannot leave their device.
        """
        if getattr(getattr(model, "model", model), "is_quantized", False):
            raise ValueError(
                "model.move_teachers must be false with a quantised teacher, got true: its weights "
                "stay on their device"
            )
        kept = []
        for tensor in _tensors(model):
            copy = tensor.data.cpu()
            kept.append(copy.pin_memory() if self.device.type == "cuda" else copy)
            tensor.data = kept[-1]
        self._kept[model] = kept
        model.register_forward_pre_hook(lambda teacher, _: self.bring(teacher))
        model.register_forward_hook(lambda *call: _apart(call[2]))

    def bring(self, model: nn.Module) -> None:
        """Have a model on the device, and no other one."""
        if self._present is model:
            return
        if self._present is not None:
            leaving = self._present
            for tensor, copy in zip(_tensors(leaving), self._kept[leaving], strict=True):
                tensor.data = copy
        for tensor, copy in zip(_tensors(model), self._kept[model], strict=True):
            tensor.data = self._lent(copy)
        self._present = model
        self.moves += 1

    def _lent(self, tensor: Tensor) -> Tensor:
        """Return a tensor of CPU memory on the device."""
        return tensor.to(self.device, non_blocking=True)


def _apart(head: kk.TeacherHead) -> kk.TeacherHead:
    """Return a head whose tensors keep their values once the teacher has left."""
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, weight=head.weight.detach(), bias=bias)


def _tensors(model: nn.Module) -> list[Tensor]:
    """List a model's weights and buffers, tied ones once."""
    return [*model.parameters(), *model.buffers()]
