"""Threads, workers, device, gpu marker, and Triton's interpreter where there is no GPU."""

import gc
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny; subprocesses inherit it

import pytest
import torch

from tests.interpreter import search_once_a_launch

gc.disable()  # until the tests are collected: searches of what is imported take 5 s of CPU
HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    """Look for garbage again, but not among the modules and the tests: 0.2 s each time.

    Triton is imported by now, where a test of kernels is among those collected.
    """
    gc.freeze()
    gc.enable()
    search_once_a_launch()


def pytest_unconfigure() -> None:
    """Let the interpreter take the modules down; where it cannot, nanobind says what leaks."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of processes of `-n auto`: 0, which is pytest's own, for one file or test.

    Eight at most: tests start processes of their own, and some of them watch a clock.
    """
    if len(config.args) == 1 and config.args[0].partition("::")[0].endswith(".py"):
        return 0
    return min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1, 8)


@pytest.fixture
def device() -> str:
    """Where kernel tests run."""
    return "cuda" if HAS_GPU else "cpu"
