"""Forward and backward of each operation against its bare GEMMs, and its memory.

Floor, plain PyTorch (not on a GPU: full logits do not fit) and ours are timed one after another
in every round, so that what slows the machine for a while slows them alike. The ratio is the
median over rounds of ours / floor. A wrong result has no speed: accuracy is checked first.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.accuracy import check_accuracy
from bench.floor import Floor
from bench.inputs import Inputs
from bench.machine import DEVICE, clock
from bench.ops import OPS, Op, clear_gradients, ours, plain
from bench.shapes import Shape

WORKSPACE_BYTES = 1_250_000_000 if DEVICE == "cuda" else 1 << 26
"""Asked for in the memory cases, for each of the one or two streams of logits."""
all_ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # a wrong result has no speed
@pytest.mark.benchmark(group="speed", timer=clock)
@all_ops
def test_speed(op: Op, inputs: Inputs, floor: Floor, rounds: int, benchmark: Any) -> None:
    errors = check_accuracy(inputs, op)
    floor_ms: list[float] = []
    naive_ms: list[float] = []

    def before_each_round() -> None:
        clear_gradients(inputs, op)
        floor_ms.append(_time_ms(lambda: floor.run(op)))
        if DEVICE == "cpu":
            naive_ms.append(_time_ms(lambda: plain(inputs, op)))

    benchmark.pedantic(
        ours, (inputs, op), setup=before_each_round, rounds=rounds, iterations=1, warmup_rounds=1
    )
    clear_gradients(inputs, op)
    ours_ms = [1e3 * seconds for seconds in benchmark.stats.stats.data]
    floor_ms, naive_ms = floor_ms[1:], naive_ms[1:]  # the first is the warm-up
    flop = op.flop(inputs.shape)
    benchmark.extra_info.update(
        _describe(op, inputs.shape),
        ours_ms=_quartiles(ours_ms),
        floor_ms=_quartiles(floor_ms),
        ratio=_quartiles([a / b for a, b in zip(ours_ms, floor_ms, strict=True)]),
        naive_ms=_quartiles(naive_ms) if naive_ms else None,
        flop=flop,
        tflop_per_s=flop / (np.median(ours_ms) * 1e9),
        floor_tflop_per_s=flop / (np.median(floor_ms) * 1e9),
        bar=op.bar if DEVICE == "cpu" else None,
        errors=errors,
    )


@pytest.mark.benchmark(group="memory: one run of a process each", timer=clock)
@all_ops
def test_memory(op: Op, shape: Shape, benchmark: Any) -> None:
    workspace = WORKSPACE_BYTES * (2 if op.kd == "rkl" else 1)
    command = [sys.executable, "-m", "bench.memory", "--op", op.name, "--shape", shape.name]
    command += ["--workspace-bytes", str(workspace)]

    def run() -> dict[str, int]:
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    benchmark.extra_info.update(
        _describe(op, shape), **benchmark.pedantic(run, rounds=1, iterations=1)
    )


def _describe(op: Op, shape: Shape) -> dict[str, Any]:
    sizes = {name: getattr(shape, name) for name in ("N", "H", "V", "H_t", "V_t")}
    return {"op": op.name, "shape": shape.name, **sizes, "dtype": str(shape.dtype)}


def _time_ms(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return 1e3 * (clock() - start)


def _quartiles(values: list[float]) -> list[float]:
    """[lower quartile, median, upper quartile]."""
    return [float(q) for q in np.percentile(values, [25, 50, 75])]
