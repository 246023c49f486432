"""Measures how time and memory grow with the tokens N, the vocabulary V and the workspace.

One of N and V moves while everything else stands still; the budget is this library's own argument.
Of the rest nothing but the usual way, the chunk loop and the bare GEMMs: these are curves, the
table of everybody is speed.py's.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.floor import Floor
from bench.inputs import Inputs, make_inputs
from bench.machine import DEVICE, clock
from bench.measures.timing import (
    OUT_OF_TIME,
    failure,
    fastest_setting,
    sample_rounds,
    share,
    timed_call,
)
from bench.ops import FLOOR, OPS_BY_NAME, Op
from bench.providers import Provider, Setting, version
from bench.providers.home import PROVIDERS
from bench.results_file import OURS, Record, record
from bench.shapes import FP32, SHAPES, Shape

MeasureMemory = Callable[[Shape, str, str, str, Setting], Mapping[str, Any]]
"""(shape, profile, operation, provider, setting) -> {"extra_bytes": ..., ...}."""
OPS = tuple(OPS_BY_NAME[name] for name in ("GRPO", "KDRL exact"))
FULL_LOGITS = "PyTorch, full logits"
BY_NAME = {
    one.name: one for one in PROVIDERS if one.name in (OURS, FULL_LOGITS, "PyTorch, chunk loop")
}
PROFILE = "reasoning"
SEEDS = 2
"""Inputs used in turn."""
LOGITS_SHARE = 0.6
"""Share of a GPU's free memory that float32 logits may take: autograd holds more than these."""
GIB = 1 << 30
K = 1 << 10


@dataclass(frozen=True, slots=True)
class ScalingSizes:
    """The sizes that are measured along each axis."""

    shape: Shape
    """V where N moves, N where V moves, H everywhere; the teacher's head is as large."""
    tokens: tuple[int, ...]
    vocabularies: tuple[int, ...]
    workspaces: tuple[int, ...]
    """Bytes, at V of the shape and workspace_tokens."""
    workspace_tokens: int


SIZES = (
    ScalingSizes(
        SHAPES["qwen2.5-7b"],
        tokens=(1 * K, 4 * K, 16 * K, 64 * K, 128 * K),
        vocabularies=(32 * K, 64 * K, 128 * K, 256 * K),
        workspaces=tuple(GIB * n // 8 for n in (2, 4, 8, 16, 32, 64)),
        workspace_tokens=16 * K,
    )
    if DEVICE == "cuda"
    else ScalingSizes(
        Shape("cpu-scaling", 128, 512, 8192, 512, 8192, FP32, "none: a minute on 2 cores"),
        tokens=(64, 256, 1024),
        vocabularies=(4096, 16384, 65536),
        workspaces=tuple(1 << n for n in (22, 24, 26, 28)),
        workspace_tokens=1024,
    )
)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A point of a curve: an operation and a provider at one value of an axis."""

    axis: str
    value: int
    op: Op
    name: str
    """Name of the provider, or FLOOR."""
    setting: tuple[tuple[str, Any], ...] | None = None
    """Items of the setting; None: the fastest."""


def points(sizes: ScalingSizes) -> dict[str, list[tuple[Shape, list[CurvePoint]]]]:
    """Return, by axis, every shape with the points that are measured on it in turns."""
    shape, names = sizes.shape, (FLOOR, *BY_NAME)

    def line(axis: str, value: int) -> list[CurvePoint]:
        return [CurvePoint(axis, value, op, name) for op in OPS for name in names]

    budgets = [
        CurvePoint("workspace", value, op, OURS, (("workspace_bytes", value),))
        for op in OPS
        for value in sizes.workspaces
    ]
    return {
        "N": [(replace(shape, N=N), line("N", N)) for N in sizes.tokens],
        "V": [(replace(shape, V=V, V_t=V), line("V", V)) for V in sizes.vocabularies],
        "workspace": [(replace(shape, N=sizes.workspace_tokens), budgets)],
    }


def records(
    rounds: int, deadline: float, measure_memory: MeasureMemory | None, sizes: ScalingSizes = SIZES
) -> Iterator[Record]:
    """Yield the records of all curves; each axis has an equal part of the time to the deadline.

    measure_memory: called after the times of an axis, while its part lasts; None: not measured.
    """
    axes = list(points(sizes).values())
    for index, shapes in enumerate(axes):
        end = share(deadline, index, len(axes))
        timed = [
            (one, shape)
            for shape, points_of_shape in shapes
            for one in _times(shape, points_of_shape, rounds, end)
        ]
        for one, shape in timed:
            if one["status"] == "ok" and one["provider"] != FLOOR and measure_memory is not None:
                one.update(_memory(one, shape, end, measure_memory))
            yield one


def _times(
    shape: Shape, points_of_shape: list[CurvePoint], rounds: int, deadline: float
) -> list[Record]:
    """Make the records of all points of one shape, without their memory."""
    records_by_point = {point: _record(point, shape) for point in points_of_shape}
    if time.monotonic() > deadline:
        return [one | {"status": OUT_OF_TIME} for one in records_by_point.values()]
    free = free_bytes()
    inputs = [make_inputs(shape, PROFILE, seed=seed) for seed in range(SEEDS)]
    floor = Floor(inputs[0])
    measures: dict[CurvePoint, Callable[[int], float]] = {}
    for point, one in records_by_point.items():
        if point.name == FULL_LOGITS and (reason := too_large(shape, point.op, free)):
            one["status"] = reason
            continue
        if point.name == FLOOR:
            measures[point] = _measure_floor(floor, point.op, inputs)
            continue
        provider = BY_NAME[point.name]
        if point.setting is None:
            one["setting"] = dict(fastest_setting(provider, inputs[0], point.op, deadline))
        measures[point] = _measure(provider, point.op, one["setting"], inputs)
    for point, samples in sample_rounds(measures, rounds, deadline).items():
        records_by_point[point]["status"] = samples.status
        if samples.values:
            records_by_point[point] |= {"total_ms": samples.values, "extra_bytes": None}
    del measures, floor, inputs
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # memory is measured in another process
    return list(records_by_point.values())


def free_bytes() -> int | None:
    """Return the free memory of a GPU, before inputs are made; None on a CPU."""
    return torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else None


def too_large(shape: Shape, op: Op, free: int | None) -> str | None:
    """Say why full logits cannot be tried here; None where they can."""
    need = 4 * shape.N * (shape.V + (shape.V_t if op.teacher_head else 0))
    if free is None or need <= LOGITS_SHARE * free:
        return None
    return f"not supported: {shape.N:,} x {shape.V:,} logits need {need / 1e9:.1f} GB"


def _measure_floor(floor: Floor, op: Op, inputs: list[Inputs]) -> Callable[[int], float]:
    def call(number: int) -> float:
        start = clock()
        floor.run(op, inputs[number % len(inputs)])
        return 1e3 * (clock() - start)

    return call


def _measure(
    provider: Provider, op: Op, setting: Setting, inputs: list[Inputs]
) -> Callable[[int], float]:
    def call(number: int) -> float:
        return sum(timed_call(provider, inputs[number % len(inputs)], op, setting))

    return call


def _record(point: CurvePoint, shape: Shape) -> Record:
    provider = BY_NAME.get(point.name)
    return record(
        "scaling",
        point.op.name,
        shape,
        PROFILE,
        point.name,
        package=provider.package if provider else None,
        version=version(provider) if provider else None,
        setting=dict(point.setting or ()),
        axis=point.axis,
        value=point.value,
    )


def _memory(one: Record, shape: Shape, deadline: float, measure: MeasureMemory) -> dict[str, Any]:
    """Return what to add to a record: extra_bytes, or why there is no figure."""
    if time.monotonic() > deadline:
        return {"memory_status": OUT_OF_TIME}
    try:
        sizes = measure(shape, PROFILE, one["op"], one["provider"], one["setting"])
    except Exception as error:  # of a process of its own: the times are still good
        return {"memory_status": failure(error)}
    return {"extra_bytes": sizes["extra_bytes"]}
