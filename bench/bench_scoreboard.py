"""Shows every operation by every provider in the tables of pytest-benchmark: pytest bench/

The rounds of an operation are interleaved (speed.py), so they are all taken when its first test
asks for them. Each test then hands its provider's samples to pytest-benchmark, whose timer it is.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench import providers
from bench.machine import clock
from bench.measures import memory
from bench.ops import KEY_OPS, OPS, Op
from bench.results_file import BOTH_OURS, Record
from bench.shapes import Shape

PROVIDERS = {one.name: one for one in providers.load()}


class Replay:
    """A timer that replays durations measured before, one for each start and stop."""

    def __init__(self) -> None:
        self.readings: Iterator[float] = iter(())

    def load(self, samples_ms: list[float]) -> None:
        """Set the samples to replay."""
        self.readings = iter([t for ms in samples_ms for t in (0.0, 1e-3 * ms)])

    def __call__(self) -> float:
        return next(self.readings)


replay = Replay()


def _figures_of(one: Record) -> Record:
    """Return a record with figures; else skip with the status, or fail for ours."""
    if one["status"] != "ok":
        if one["provider"] in BOTH_OURS and not one["status"].startswith("not supported"):
            pytest.fail(one["status"])
        pytest.skip(one["status"])
    return one


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # who is skipped has no speed
@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(
    ("op", "provider"), [(op.name, name) for op in OPS for name in (*op.floors, *PROVIDERS)]
)
def test_speed(
    op: str, provider: str, shape: Shape, speed_of: Callable[[str, str], Record], benchmark: Any
) -> None:
    one = _figures_of(speed_of(op, provider))
    benchmark.group = f"{op}, shape {shape.name}: forward and backward"
    benchmark.extra_info["records"] = [one]
    replay.load(one["total_ms"])
    benchmark.pedantic(lambda: None, rounds=len(one["total_ms"]), iterations=1)


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS)
@pytest.mark.parametrize("op", KEY_OPS, ids=lambda op: op.name)
def test_memory(
    op: Op, provider: providers.Provider, shape: Shape, profile: str, benchmark: Any
) -> None:
    start = clock()
    pair = provider, provider.settings[0]
    (memory_record,) = memory.records(op, shape, profile, [pair], deadline=math.inf)
    one = _figures_of(memory_record)
    benchmark.group = f"{op.name}, shape {shape.name}: memory is in the JSON, this is a process"
    benchmark.extra_info["records"] = [one]
    replay.load([1e3 * (clock() - start)])
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
