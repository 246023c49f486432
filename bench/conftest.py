"""pytest-benchmark: which shape, how many rounds, and the machine beside the figures."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default will change

from bench import machine
from bench.floor import Floor
from bench.inputs import Inputs, make_inputs
from bench.shapes import SHAPES, Shape, default_shape


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this folder."""
    parser.addoption("--shape", choices=SHAPES, default=default_shape().name)
    parser.addoption("--rounds", type=int, default=20 if machine.DEVICE == "cuda" else 10)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:  # noqa: ARG001
    """Add ours to the plugin's."""
    machine_info["kdrl"] = machine.machine_info()


@pytest.fixture(autouse=True, scope="session")
def threads() -> Iterator[None]:
    """As many CPU threads as every CPU figure has, and then as many as before."""
    before = torch.get_num_threads()
    machine.use_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shape(pytestconfig: pytest.Config) -> Shape:
    """The shape asked for; else that of the targets on this machine."""
    return SHAPES[pytestconfig.getoption("--shape")]


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    """Timed rounds of each operation."""
    return int(pytestconfig.getoption("--rounds"))


@pytest.fixture(scope="session")
def inputs(shape: Shape) -> Inputs:
    """One set for all operations."""
    with torch.no_grad():
        return make_inputs(shape)


@pytest.fixture(scope="session")
def floor(inputs: Inputs) -> Floor:
    """The bare GEMMs on these inputs."""
    return Floor(inputs)
