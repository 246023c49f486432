"""Pretends that tensors are on a GPU, and records where the host would wait for it.

Such a tensor computes on the CPU, but says that its device is cuda:0, and makes others that do.
The host waits where it reads a value or a size that depends on one, and where it copies what is not
pinned, or to the CPU. Each wait is recorded with the function of this repository that caused it. An
operator on tensors of both devices raises, as on a GPU. A copy to pinned memory arrives with the
next wait for it: who reads earlier reads NaN. What is not seen: what a wait costs, and waits inside
the kernels of PyTorch that read no value.
"""

import sys
from collections import Counter, deque
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from kdrl_kernels import checks

GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parent.parent
ROOMS = tuple(str(ROOT / name) for name in ("kdrl_kernels", "kdrl_train"))
READS_VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"}
READS_VALUES |= {"unique_consecutive", "unique_dim_consecutive", "equal", "bincount"}
"""Operators whose result, or its size, the host knows only once the GPU has computed it."""
DEVICE: Any = Tensor.device.__get__  # type: ignore[attr-defined]
IS_CUDA: Any = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class GpuTensor(Tensor):
    """Stands for a tensor on the GPU; `data_` is its memory, on the CPU."""

    data_: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> "GpuTensor":
        """Make one with the memory of a tensor on the CPU."""
        made: GpuTensor = Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
        )
        made.data_ = data
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GpuTensor({self.data_})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        gpu = PretendedGpu.current
        assert gpu is not None, "a pretended GPU must be entered"
        if func.namespace == "kdrl":  # an operator of this repository: its code runs here too
            with gpu:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if func.namespace == "c10d":  # the ranks meet on the GPU, and the host does not wait
            return func(*tree_map(_memory, args), **tree_map(_memory, kwargs))
        if name == "copy_" and gpu.sends(*args, **kwargs):
            return args[0]
        gpu.look_at(name, args, kwargs)
        out = func(*tree_map(_memory, args), **tree_map(_memory, kwargs))
        return return_and_correct_aliasing(func, args, kwargs, tree_map(on_gpu, out))


def on_gpu(value: Any) -> Any:
    """Return a tensor as one on the pretended GPU; anything else as it is."""
    return GpuTensor(value) if type(value) is Tensor else value


def move(module: nn.Module) -> nn.Module:
    """Put the parameters and buffers of a module on the pretended GPU; tied ones stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                made = nn.Parameter(GpuTensor(value.data), value.requires_grad)
                part._parameters[name] = moved.setdefault(id(value), made)
        for name, buffer in part._buffers.items():
            part._buffers[name] = on_gpu(buffer)
    return module


def _is_named(path: str) -> bool:
    """Say whether a wait is that of code in this file, and not of what called it."""
    return path.startswith(ROOMS) and not path.endswith("copies.py")


def _memory(value: Any) -> Any:
    return value.data_ if isinstance(value, GpuTensor) else value


class PretendedGpu(TorchFunctionMode):
    """Makes the pretended GPU work inside a `with` block, and counts the waits in it."""

    current: "PretendedGpu | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """What waited -> how often: "kdrl_train/step/update.py clip: _local_scalar_dense"."""
        self.pinned: dict[int, Any] = {}
        """Storages of pinned memory by their address; they are kept, so it is not used again."""
        self.sent = 0
        """Copies to pinned memory that were begun."""
        self._pending: deque[tuple[Tensor, Tensor]] = deque()

    def __enter__(self) -> "PretendedGpu":
        """Begin to pretend; a block may be inside another one of the same object."""
        PretendedGpu.current = self
        super().__enter__()
        return self

    def wait(self, what: str, sent: int | None = None) -> None:
        """Record a wait of the function of this repository that is at work.

        sent: how many copies to pinned memory have arrived then; None: all.
        """
        last = self.sent if sent is None else sent
        while self.sent - len(self._pending) < last:
            target, values = self._pending.popleft()
            target.copy_(values)
        frame = sys._getframe(1)
        while frame is not None and not _is_named(frame.f_code.co_filename):
            frame = frame.f_back  # type: ignore[assignment]
        where = "elsewhere"
        if frame is not None:
            path = Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()
            where = f"{path} {frame.f_code.co_qualname}"
        self.waits[f"{where}: {what}"] += 1

    @property
    def under_way(self) -> int:
        """Copies to pinned memory that have not arrived."""
        return len(self._pending)

    def pin(self, tensor: Tensor) -> Tensor:
        """Have the memory of a tensor on the CPU count as pinned."""
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Say whether a tensor, maybe a view, is in pinned memory."""
        return tensor.untyped_storage().data_ptr() in self.pinned

    def send(self, target: Tensor, values: Tensor) -> Tensor:
        """Begin to copy values, as they are now, to pinned memory; return it."""
        target.fill_(torch.nan if target.is_floating_point() else 77)
        self._pending.append((target, values.clone()))
        self.sent += 1
        return target

    def sends(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> bool:
        """Do what copy_ does where the host does not wait for it; say whether that is so."""
        to_gpu, from_gpu = (isinstance(x, GpuTensor) for x in (target, source))
        if not non_blocking or to_gpu == from_gpu:
            return False
        if not self.is_pinned(source if to_gpu else target):
            return False
        if to_gpu:
            _memory(target).copy_(source)
        else:
            self.send(target, _memory(source))
        return True

    def look_at(self, name: str, args: Any, kwargs: Any) -> None:
        """Record a wait of an operator; raise where its tensors are on two devices."""
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        apart = any(not isinstance(x, GpuTensor) and x.ndim > 0 for x in tensors)
        assert not apart or name in INDEXED or name == "copy_", f"{name} of tensors on two devices"
        masks = name in INDEXED and any(x.dtype == torch.bool for x in tensors[1:])
        sizes = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in READS_VALUES or apart or masks or sizes:
            self.wait(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over what says where a tensor is, or moves it."""
        kwargs = dict(kwargs or {})
        take_over = {
            DEVICE: lambda x: GPU if isinstance(x, GpuTensor) else DEVICE(x),
            IS_CUDA: lambda x: isinstance(x, GpuTensor),
            Tensor.backward: self.backward,
            Tensor.pin_memory: lambda x: self.pin(x.clone()),
            Tensor.to: self.to,
            Tensor.cpu: lambda x: self.to(x, "cpu"),
            Tensor.tolist: lambda x: self.to(x, "cpu").tolist(),
        }.get(func)
        if take_over is not None:
            return take_over(*args, **kwargs)
        if kwargs.pop("pin_memory", False):
            return self.pin(func(*args, **kwargs))
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        made = func(*args, **kwargs | {"device": "cpu"})
        if func in (torch.tensor, torch.as_tensor) and made.numel():  # from numbers of the host
            self.wait(func.__name__)
        return tree_map(on_gpu, made)

    def backward(self, loss: Tensor, **_: Any) -> None:
        """Do what Tensor.backward does, pretending in the backward functions too."""
        with self:
            _engine_run_backward(
                (loss,),
                (torch.ones_like(loss),),
                *(False, False, ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )

    def to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Do what Tensor.to does; a copy waits unless it is told not to, from pinned memory."""
        if args and isinstance(args[0], Tensor):
            args = (GPU if isinstance(args[0], GpuTensor) else "cpu", args[0].dtype, *args[1:])
        kwargs.pop("copy", None)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        from_gpu = isinstance(tensor, GpuTensor)
        to_gpu = from_gpu if device is None else device.type == "cuda"
        if from_gpu == to_gpu:
            return Tensor.to(tensor, dtype or tensor.dtype)
        copy = _memory(tensor.detach()).to(dtype or tensor.dtype, copy=True)
        if from_gpu and non_blocking:  # to new memory, which PyTorch pins
            return self.send(torch.empty_like(copy), copy)
        if not (non_blocking and self.is_pinned(tensor)):
            self.wait("to")
        return GpuTensor(copy) if to_gpu else copy


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing
        self.sent = 0

    def record(self) -> None:
        """Note which copies were begun before."""
        assert PretendedGpu.current is not None
        self.sent = PretendedGpu.current.sent

    def synchronize(self) -> None:
        """Wait for them."""
        assert PretendedGpu.current is not None
        PretendedGpu.current.wait("Event.synchronize", self.sent)

    def elapsed_time(self, other: "Event") -> float:
        """Return some milliseconds."""
        assert self.timed
        assert other.timed
        return 1.0


def _by_device(groups: Any, *args: Any) -> Any:
    """Group tensors as torch does, which sees the device that they are on in truth."""
    (key, value), *others = torch.utils._foreach_utils._group_tensors_by_device_and_dtype(
        groups, *args
    ).items()
    assert not others
    on = GPU if isinstance(groups[0][0], GpuTensor) else key[0]
    return {(on, *key[1:]): value}


def pretend(patch: pytest.MonkeyPatch) -> PretendedGpu:
    """Return a pretended GPU, after patching what asks PyTorch itself for a real one."""
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "device", lambda _: nullcontext())
    patch.setattr(checks, "_has_triton", lambda: False)  # whose kernels want memory of the GPU
    patch.setattr(torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", _by_device)
    return PretendedGpu()
