"""Describes the machine that a figure comes from, and reads its clock: python -m bench.machine

--device cuda ends with exit code 3 where PyTorch sees no GPU, and says why.
"""

import argparse
import ctypes
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

THREADS = 2
"""CPU threads with which every CPU figure is measured."""
NO_DEVICE = 3
"""Exit code where PyTorch runs on another device than it must."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Options of glibc's mallopt, from malloc.h."""


def set_up_cpu() -> None:
    """Set the threads of work on a CPU, and keep freed memory, as the allocator of a GPU does.

    A new tensor of 128 MB costs up to 150 ms of page faults else, at the system's whim.
    """
    if DEVICE == "cpu":
        torch.set_num_threads(THREADS)
        malloc_options({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def malloc_options(values: dict[int, int]) -> None:
    """Set options of malloc; nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if _is_linux() else None
    if mallopt is None:
        return
    for option, value in values.items():
        if not mallopt(option, value):
            raise OSError(f"mallopt refuses option {option} with value {value}")


def clock() -> float:
    """Return the time in seconds, after the GPU has finished all work so far."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def readings() -> dict[str, float]:
    """Read what the device offers of clock_mhz, temperature_c and power_w."""
    if DEVICE == "cuda":
        return _gpu_readings()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if _is_linux() else []
    clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return {"clock_mhz": sum(clocks) / len(clocks)} if clocks else {}


def _gpu_readings() -> dict[str, float]:
    names = ("clocks.sm", "temperature.gpu", "power.draw")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        values = [float(value) for value in done.stdout.splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}  # no nvidia-smi here, or it does not tell
    return dict(zip(("clock_mhz", "temperature_c", "power_w"), values, strict=True))


def machine_info() -> dict[str, Any]:
    """Return device, versions, commit and threads."""
    info: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _cpu_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": _git("status", "--porcelain", "--", "kdrl_kernels"),
        "threads": torch.get_num_threads(),
    }
    if DEVICE == "cuda":
        info["cuda"] = torch.version.cuda
        info["driver"] = _driver()
        info["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return info


def one_line(info: dict[str, Any]) -> str:
    """Write the machine in one line, as a table's caption."""
    commit = (info["commit"] or "unknown")[:7] + ("+" if info["uncommitted"] else "")
    return (
        f"{info['device']}, {info['threads']} threads, torch {info['torch']}, "
        f"triton {info['triton']}, python {info['python']}, commit {commit}"
    )


def _driver() -> str | None:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else None


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if _is_linux() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()


def _is_linux() -> bool:
    return platform.system() == "Linux"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Return the output of a git command in this repository; None without git or a repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parents[1]), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main() -> None:
    """Print the machine in one line; exit with NO_DEVICE where another device is needed."""
    parser = argparse.ArgumentParser(prog="python -m bench.machine", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default=DEVICE, help="what is needed")
    device = parser.parse_args().device
    print(one_line(machine_info()), readings(), flush=True)
    if device != DEVICE:
        print(f"PyTorch must run on {device} (--device), runs on {DEVICE}{_why()}")
        sys.exit(NO_DEVICE)


def _why() -> str:
    """Say why PyTorch sees no GPU, where it does not."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f": {error}"
    return ""


if __name__ == "__main__":
    main()
