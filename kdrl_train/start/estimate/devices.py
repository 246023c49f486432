"""What a device can do: a table of peaks, and this machine's CPU, measured."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

DeviceName = Literal["a100", "h100", "h200", "b200", "cpu"]
GLOO_BYTES_PER_S = 1e9
"""Between processes on one CPU; a guess."""
GEMM_SIZE = 1024
COPY_ELEMENTS = 1 << 24
ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What one process has, at the share of the peaks that it is said to reach."""

    memory_bytes: float
    flops: float
    """FLOP/s of GEMMs in the run's dtype."""
    bandwidth: float
    """Bytes/s of memory, read plus written."""
    link: float
    """Bytes/s that one device receives from the others in a collective."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """A data sheet (SXM modules, dense, no sparsity)."""

    memory_gb: float
    """As sold, in 1e9 bytes; the device has about 5% more, which the CUDA context and NCCL take."""
    bfloat16: float
    """TFLOP/s."""
    float32: float
    """TFLOP/s without TF32, which PyTorch leaves off."""
    bandwidth: float
    """TB/s."""
    nvlink: float
    """GB/s in one direction, inside a node."""
    network: float
    """GB/s in one direction of a GPU's network card."""


PEAKS = {
    "a100": Peaks(memory_gb=80, bfloat16=312, float32=19.5, bandwidth=2.04, nvlink=300, network=25),
    "h100": Peaks(memory_gb=80, bfloat16=989, float32=67, bandwidth=3.35, nvlink=450, network=50),
    "h200": Peaks(memory_gb=141, bfloat16=989, float32=67, bandwidth=4.8, nvlink=450, network=50),
    "b200": Peaks(memory_gb=180, bfloat16=2250, float32=75, bandwidth=8, nvlink=900, network=50),
}


def link_gb_per_s(peaks: Peaks, gpus: int, gpus_per_node: int) -> float:
    """GB/s a GPU receives at most: over several nodes their cards together bound all of a node."""
    if gpus <= gpus_per_node:
        return peaks.nvlink
    return min(peaks.nvlink, gpus_per_node * peaks.network)


def measure_cpu(dtype: torch.dtype, processes: int) -> Device:
    """This machine's CPU, shared by so many processes: a GEMM and a copy, the best of three.

    Raises: ValueError where the system does not say how much memory it has.
    """
    a = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
    source = torch.zeros(COPY_ELEMENTS)
    target = torch.zeros(COPY_ELEMENTS)
    gemm_s = _best(lambda: torch.mm(a, a))
    copy_s = _best(lambda: target.copy_(source))
    return Device(
        memory_bytes=memory_bytes(torch.device("cpu"), processes),
        flops=2 * GEMM_SIZE**3 / gemm_s / processes,
        bandwidth=2 * source.nbytes / copy_s / processes,
        link=GLOO_BYTES_PER_S,
    )


def memory_bytes(device: torch.device, processes: int) -> float:
    """Of a GPU all that it has; of this machine the share of one of so many processes on it."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return _system_memory() / processes


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of ROUNDS calls, after one to warm up."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _system_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as error:
        raise ValueError(
            "--gpu-memory must be given where the system does not tell its memory, got nothing"
        ) from error
