"""Says how fast a device is: GPUs by their data sheets, this CPU by a measurement."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

DeviceName = Literal["a100", "h100", "h200", "b200", "cpu"]
GLOO_BYTES_PER_S = 1e9
"""Speed between processes on one CPU; a guess."""
GEMM_SIZE = 1024
COPY_ELEMENTS = 1 << 24
ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Holds the memory and the speeds that one process can count on."""

    memory_bytes: float
    flops: float
    """FLOP/s that GEMMs reach in the run's dtype."""
    bandwidth: float
    """Bytes/s that memory reaches, read plus written."""
    link: float
    """Bytes/s that one device receives from the others in a collective."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """Holds the numbers of a data sheet (SXM modules, dense matrices)."""

    memory_gb: float
    """Memory as sold, in 1e9 bytes; the device has about 5% more, for the CUDA context and NCCL."""
    bfloat16: float
    """TFLOP/s in bfloat16."""
    float32: float
    """TFLOP/s in float32 without TF32, which PyTorch does not use by default."""
    bandwidth: float
    """TB/s of memory."""
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
    """Returns the GB/s that a GPU receives at most.

    Over several nodes, the GPUs of a node share its network cards.
    """
    if gpus <= gpus_per_node:
        return peaks.nvlink
    return min(peaks.nvlink, gpus_per_node * peaks.network)


def measure_cpu(dtype: torch.dtype, processes: int) -> Device:
    """Measures this CPU with a GEMM and a copy (best of three) and divides it by the processes.

    Raises: ValueError if the system does not report its memory.
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
    """Returns the memory of a GPU, or the share of this machine's memory that each process gets."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return _system_memory() / processes


def _best(work: Callable[[], object]) -> float:
    """Returns the seconds of the fastest of ROUNDS calls, after one to warm up."""
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
            "--gpu-memory must be set where the system does not report its memory, got "
            "nothing: pass the GB of one process"
        ) from error
