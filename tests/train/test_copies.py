"""copies: one wait for many tensors, and none for what is sent."""

import pytest
import torch

from kdrl_train.copies import to_device, to_host
from tests.pretended_gpu import GpuTensor, on_gpu, pretend


def test_tensors_of_one_dtype_come_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (), "b": (2, 3), "c": (0,), "d": (4,), "e": (2,)}
    values = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    values |= {"d": values["d"].double(), "here": torch.arange(3)}
    with pretend(monkeypatch) as gpu:
        host = to_host({k: v if k == "here" else on_gpu(v) for k, v in values.items()})
        assert gpu.waits.total() == 2  # float32 and float64
    assert list(host) == list(values)
    for name, value in values.items():
        assert type(host[name]) is torch.Tensor
        assert host[name].dtype == value.dtype
        assert torch.equal(host[name], value)
    assert to_host({}) == {}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_copy_to_the_gpu_is_not_waited_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.arange(6).view(2, 3)
    with pretend(monkeypatch) as gpu:
        copy = to_device(value, device)
        assert copy.device.type == device
        assert not gpu.waits
    assert torch.equal(copy.data_ if isinstance(copy, GpuTensor) else copy, value)
