"""How time and memory grow: with the tokens N, with the vocabulary V, with the workspace.

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
"""Of the free memory of a GPU that float32 logits may take: autograd holds more than these."""
GIB = 1 << 30
K = 1 << 10


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured along each axis."""

    shape: Shape
    """V where N moves, N where V moves, H everywhere; the teacher's head is as large."""
    tokens: tuple[int, ...]
    vocabularies: tuple[int, ...]
    workspaces: tuple[int, ...]
    """Bytes, at V of the shape and workspace_tokens."""
    workspace_tokens: int


SIZES = (
    Sizes(
        SHAPES["qwen2.5-7b"],
        tokens=(1 * K, 4 * K, 16 * K, 64 * K, 128 * K),
        vocabularies=(32 * K, 64 * K, 128 * K, 256 * K),
        workspaces=tuple(GIB * n // 8 for n in (2, 4, 8, 16, 32, 64)),
        workspace_tokens=16 * K,
    )
    if DEVICE == "cuda"
    else Sizes(
        Shape("cpu-scaling", 128, 512, 8192, 512, 8192, FP32, "none: a minute on 2 cores"),
        tokens=(64, 256, 1024),
        vocabularies=(4096, 16384, 65536),
        workspaces=tuple(1 << n for n in (22, 24, 26, 28)),
        workspace_tokens=1024,
    )
)


@dataclass(frozen=True, slots=True)
class Point:
    """One place of one curve."""

    axis: str
    value: int
    op: Op
    name: str
    """Of the provider, or FLOOR."""
    setting: tuple[tuple[str, Any], ...] | None = None
    """Items; None: the fastest."""


def points(sizes: Sizes) -> dict[str, list[tuple[Shape, list[Point]]]]:
    """By axis: every shape, with what is measured on it, in turns."""
    shape, names = sizes.shape, (FLOOR, *BY_NAME)

    def line(axis: str, value: int) -> list[Point]:
        return [Point(axis, value, op, name) for op in OPS for name in names]

    budgets = [
        Point("workspace", value, op, OURS, (("workspace_bytes", value),))
        for op in OPS
        for value in sizes.workspaces
    ]
    return {
        "N": [(replace(shape, N=N), line("N", N)) for N in sizes.tokens],
        "V": [(replace(shape, V=V, V_t=V), line("V", V)) for V in sizes.vocabularies],
        "workspace": [(replace(shape, N=sizes.workspace_tokens), budgets)],
    }


def records(
    rounds: int, deadline: float, measure_memory: MeasureMemory | None, sizes: Sizes = SIZES
) -> Iterator[Record]:
    """All curves; of the time up to the deadline (time.monotonic) each axis has an equal part.

    measure_memory: asked after the times of an axis, while its part lasts; None: not measured.
    """
    axes = list(points(sizes).values())
    for index, shapes in enumerate(axes):
        end = share(deadline, index, len(axes))
        timed = [(one, shape) for shape, here in shapes for one in _times(shape, here, rounds, end)]
        for one, shape in timed:
            if one["status"] == "ok" and one["provider"] != FLOOR and measure_memory is not None:
                one.update(_memory(one, shape, end, measure_memory))
            yield one


def _times(shape: Shape, here: list[Point], rounds: int, deadline: float) -> list[Record]:
    """Records of all points of one shape, without their memory."""
    found = {point: _record(point, shape) for point in here}
    if time.monotonic() > deadline:
        return [one | {"status": OUT_OF_TIME} for one in found.values()]
    free = free_bytes()
    inputs = [make_inputs(shape, PROFILE, seed=seed) for seed in range(SEEDS)]
    floor = Floor(inputs[0])
    measures: dict[Point, Callable[[int], float]] = {}
    for point, one in found.items():
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
        found[point]["status"] = samples.status
        if samples.values:
            found[point] |= {"total_ms": samples.values, "extra_bytes": None}
    del measures, floor, inputs
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # memory is measured in another process
    return list(found.values())


def free_bytes() -> int | None:
    """Of a GPU, before inputs are made; None on a CPU."""
    return torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else None


def too_large(shape: Shape, op: Op, free: int | None) -> str | None:
    """Why full logits cannot be tried here, or None where they can."""
    need = 4 * shape.N * (shape.V + (shape.V_t if op.kd else 0))
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


def _record(point: Point, shape: Shape) -> Record:
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
    """What to add to a record: extra_bytes, or why there is no figure."""
    if time.monotonic() > deadline:
        return {"memory_status": OUT_OF_TIME}
    try:
        found = measure(shape, PROFILE, one["op"], one["provider"], one["setting"])
    except Exception as error:  # of a process of its own: the times are still good
        return {"memory_status": failure(error)}
    return {"extra_bytes": found["extra_bytes"]}
