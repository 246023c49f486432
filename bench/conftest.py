"""Sets up pytest-benchmark: shape, rounds, and the machine beside the figures."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default will change

from bench import machine, providers
from bench.inputs import PROFILES, Inputs, make_inputs
from bench.measures import speed
from bench.ops import OPS_BY_NAME
from bench.results_file import Record
from bench.shapes import SHAPES, Shape, default_shape

Lookup = Callable[[str, str], Record]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this folder."""
    parser.addoption("--shape", choices=SHAPES, default=default_shape().name)
    parser.addoption("--profile", choices=PROFILES, default="reasoning", help="of the entropy")
    parser.addoption("--rounds", type=int, default=10, help="timed calls each")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Leave the machine to one process: what is timed must not share it."""
    return 0


def pytest_configure(config: pytest.Config) -> None:
    """Report why a case was skipped, without an option."""
    config.option.reportchars += "s"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:  # noqa: ARG001
    """Add our description of the machine to the plugin's."""
    machine_info["kdrl"] = machine.machine_info()


@pytest.fixture(autouse=True, scope="session")
def threads() -> Iterator[None]:
    """Use as many CPU threads as every CPU figure has, then restore the number."""
    before = torch.get_num_threads()
    machine.set_up_cpu()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shape(pytestconfig: pytest.Config) -> Shape:
    """Return the shape of --shape."""
    return SHAPES[pytestconfig.getoption("--shape")]


@pytest.fixture(scope="session")
def profile(pytestconfig: pytest.Config) -> str:
    """Return the entropy profile of --profile."""
    return str(pytestconfig.getoption("--profile"))


@pytest.fixture(scope="session")
def inputs(shape: Shape, profile: str) -> list[Inputs]:
    """Make two sets of inputs for all operations, used in turn."""
    return [make_inputs(shape, profile, seed=seed, teachers=2) for seed in range(2)]


@pytest.fixture(scope="session")
def speed_of(inputs: list[Inputs], pytestconfig: pytest.Config) -> Lookup:
    """Return a function (operation, provider) -> record, which times all providers together."""
    records_by_case: dict[tuple[str, str], Record] = {}

    def look_up(op: str, provider: str) -> Record:
        if (op, provider) not in records_by_case:
            rounds = pytestconfig.getoption("--rounds")
            everybody = providers.load()
            for one in speed.records(OPS_BY_NAME[op], inputs, everybody, rounds, float("inf")):
                records_by_case[op, one["provider"]] = one
        return records_by_case[op, provider]

    return look_up
