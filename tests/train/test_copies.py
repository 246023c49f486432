"""copies: one wait for many tensors, and none for what is sent."""

import pytest
import torch

from kdrl_train import copies
from kdrl_train.copies import host_copies, to_device, to_host
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


@pytest.mark.parametrize("numbers", [1, 5, 32, 1000])
def test_weights_come_through_two_buckets(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "BUCKET_BYTES", 2 * numbers)
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (), "b": (2, 3), "none": (0, 4), "large": (9, 11), "c": (7, 5), "d": (1,)}
    values = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    values["c"] = values["c"].T  # not contiguous
    values |= {"16 bits": values["b"].bfloat16(), "here": torch.randn(3, generator=draw)}
    with pretend(monkeypatch) as gpu:
        under_way: list[int] = []
        wait = gpu.wait
        monkeypatch.setattr(gpu, "wait", lambda *x: [wait(*x), under_way.append(gpu.under_way)])
        sent = ((k, v if k == "here" else on_gpu(v)) for k, v in values.items())
        host = dict(host_copies(sent, torch.bfloat16))
        count = sum(v.numel() for k, v in values.items() if k != "here")
        assert gpu.waits == {"elsewhere: Event.synchronize": -(-count // numbers)}
        assert all(under_way[:-1])  # the other bucket is filled meanwhile
        assert [len(storage) for storage in gpu.pinned.values()] == [2 * numbers] * 2
    assert host.keys() == values.keys()
    for name, value in values.items():
        assert type(host[name]) is torch.Tensor
        assert host[name].is_contiguous()
        assert host[name].dtype == torch.bfloat16
        assert torch.equal(host[name], value.bfloat16()), name


@pytest.mark.gpu
def test_weights_come_through_buckets_of_a_real_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "BUCKET_BYTES", 1 << 16)
    slow = torch.randn(4096, 4096, device="cuda") @ torch.randn(4096, 4096, device="cuda")
    values = {n: slow.flatten()[n : 3 * n].clone() for n in (1, 1000, 1 << 14, 1 << 16, 10**6)}
    host = dict(host_copies(values.items(), torch.bfloat16))
    assert host.keys() == values.keys()
    for n, value in values.items():
        assert torch.equal(host[n], value.bfloat16().cpu()), n


def test_weights_of_the_cpu_need_no_bucket() -> None:
    value = torch.arange(6.0).view(2, 3)
    ((_, copy),) = host_copies([("w", value)], torch.float32)
    assert copy.data_ptr() == value.data_ptr()
    assert not dict(host_copies([], torch.float32))
