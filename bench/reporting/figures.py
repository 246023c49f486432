"""Computes the figures of a report from a run's records: quartiles, ratios by round, fits."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.ops import FLOOR, FLOORS, OPS_BY_NAME
from bench.results_file import BOTH_OURS, OURS, SKETCH, Record, Run


@dataclass(frozen=True, slots=True)
class Spread:
    """The quartiles of some samples."""

    low: float
    median: float
    high: float
    paired: bool = True
    """False: it is a ratio of two medians, since both were not timed in the same rounds."""


@dataclass(frozen=True, slots=True)
class ProviderFigures:
    """The figures of one provider in an operation; None where there is none."""

    op: str
    provider: str
    version: str | None
    status: str
    total: Spread | None = None
    """Time of forward and backward, in ms as all times."""
    forward: Spread | None = None
    backward: Spread | None = None
    per_floor: Spread | None = None
    """Its time / the floor's."""
    per_ours: Spread | None = None
    """Its time / ours: above 1 where ours is faster."""
    per_sketch: Spread | None = None
    """Its time / that of our sketch."""
    floor_share: float | None = None
    """Floor / its time."""
    tflop_per_s: float | None = None
    tokens_per_s: float | None = None
    extra_bytes: float | None = None
    memory_status: str | None = None
    """Status of the memory record; None without a record."""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)
    tried: int = 0
    """Number of settings that were timed before the fastest was taken."""

    def per(self, ours: str) -> Spread | None:
        """Return its time / that of one of BOTH_OURS."""
        return self.per_sketch if ours == SKETCH else self.per_ours


@dataclass(frozen=True, slots=True)
class ShapeFigures:
    """All figures of one shape and profile, by operation: the floor, then by time, then others."""

    shape: str
    profile: str
    sizes: dict[str, int]
    dtype: str
    cases: dict[str, list[ProviderFigures]]

    def find(self, op: str, provider: str) -> ProviderFigures | None:
        """Return the figures of a provider; None where it has none."""
        return next((case for case in self.cases[op] if case.provider == provider), None)

    def peers(self, op: str) -> list[ProviderFigures]:
        """List the providers with a time, except the floors and ours, fastest first."""
        return [c for c in self.cases[op] if c.total and c.provider not in (*FLOORS, *BOTH_OURS)]


@dataclass(frozen=True, slots=True)
class Line:
    """The line of a provider along an axis of a scaling measurement."""

    provider: str
    points: list[Record]
    """Its records by value, with any status."""
    time_power: float | None
    """time ~ value ** time_power."""
    memory_power: float | None

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Return (values, figures), above 0, of "total_ms" (medians) or "extra_bytes"."""
        pairs = []
        for one in self.points:
            quartiles = spread(samples(one.get(name))) if one["status"] == "ok" else None
            if quartiles and quartiles.median > 0:
                pairs.append((float(one["value"]), quartiles.median))
        return [value for value, _ in pairs], [figure for _, figure in pairs]


def samples(value: Any) -> list[float]:
    """Return the samples of a record's entry, which is a list, one number, or None."""
    if value is None:
        return []
    return [float(v) for v in value] if isinstance(value, list) else [float(value)]


def spread(values: Sequence[float], paired: bool = True) -> Spread | None:
    """Compute quartiles; None without values."""
    if not values:
        return None
    low, median, high = (float(q) for q in np.percentile(values, [25, 50, 75]))
    return Spread(low, median, high, paired)


def ratios(over: Any, under: Any) -> list[float]:
    """Divide sample by sample, as far as both go."""
    return [a / b for a, b in zip(samples(over), samples(under), strict=False) if b > 0]


def time_ratio(over: Record | None, under: Record | None) -> Spread | None:
    """Divide two records' times by round, or their medians if they are of different runs."""
    if not over or not under or over["status"] != "ok" or under["status"] != "ok":
        return None
    a, b = over.get("total_ms"), under.get("total_ms")
    if over.get("run") == under.get("run"):
        return spread(ratios(a, b))
    a, b = spread(samples(a)), spread(samples(b))
    return spread([a.median / b.median], paired=False) if a and b and b.median > 0 else None


def power(values: Sequence[float], figures: Sequence[float]) -> float | None:
    """Fit the slope of log(figure) on log(value) by least squares; None below two values."""
    if len(set(values)) < 2:
        return None
    return float(np.polyfit(np.log(values), np.log(figures), 1)[0])


def groups(run: Run) -> list[ShapeFigures]:
    """Group the "speed" and "memory" records by shape and profile, the most records first."""
    records = [one for one in run["records"] if one["kind"] in ("speed", "memory")]
    size = Counter((one["shape"], one["profile"]) for one in records)
    of_shape = Counter(one["shape"] for one in records)
    shapes = []
    for shape, profile in sorted(size, key=lambda key: (-of_shape[key[0]], key[0], -size[key])):
        shape_records = [
            one for one in records if (one["shape"], one["profile"]) == (shape, profile)
        ]
        names = dict.fromkeys(one["op"] for one in shape_records)
        cases = {
            op: _cases([one for one in shape_records if one["op"] == op]) for op in in_order(names)
        }
        shapes.append(
            ShapeFigures(
                shape, profile, shape_records[0]["sizes"], shape_records[0]["dtype"], cases
            )
        )
    return shapes


def in_order(ops: Iterable[str]) -> list[str]:
    """Sort operations as in ops.py, unknown ones last."""
    known = list(OPS_BY_NAME)
    return sorted(ops, key=lambda op: known.index(op) if op in known else len(known))


def _cases(records: list[Record]) -> list[ProviderFigures]:
    """Make the figures of one operation: the floor first, then by time, then those without."""
    speed, memory = (
        {one["provider"]: one for one in records if one["kind"] == kind}
        for kind in ("speed", "memory")
    )
    cases = [_case(name, speed, memory.get(name)) for name in dict.fromkeys([*speed, *memory])]
    return sorted(
        cases,
        key=lambda c: (c.provider != FLOOR, c.total.median if c.total else float("inf"), c.status),
    )


def _case(provider: str, speed: dict[str, Record], memory: Record | None) -> ProviderFigures:
    one, floor = speed.get(provider), speed.get(FLOOR)
    ok_memory = memory is not None and memory["status"] == "ok"
    shared: dict[str, Any] = {
        "extra_bytes": memory["extra_bytes"] if memory and ok_memory else None,
        "memory_status": memory["status"] if memory else None,
    }
    known = one or memory
    assert known is not None
    names = (known["op"], provider, known.get("version"))
    total = spread(samples(one.get("total_ms"))) if one and one["status"] == "ok" else None
    if one is None or total is None:
        status = "not timed" if one is None or one["status"] == "ok" else one["status"]
        return ProviderFigures(*names, status, **shared)
    share = time_ratio(floor, one)
    flop = one.get("flop") or (floor or {}).get("flop")
    return ProviderFigures(
        *names,
        "ok",
        total=total,
        forward=spread(samples(one.get("forward_ms"))),
        backward=spread(samples(one.get("backward_ms"))),
        per_floor=time_ratio(one, floor),
        per_ours=time_ratio(one, speed.get(OURS)),
        per_sketch=time_ratio(one, speed.get(SKETCH)),
        floor_share=share.median if share else None,
        tflop_per_s=flop / total.median / 1e9 if flop else None,
        tokens_per_s=1e3 * one["sizes"]["N"] / total.median,
        errors=one.get("errors") or {},
        setting=one.get("setting") or {},
        tried=len(one.get("tried") or []),
        **shared,
    )


def scaling(run: Run) -> dict[tuple[str, str, str, str], list[Line]]:
    """Return {(op, shape, profile, axis): lines}, ours first, the floor last."""
    points: dict[tuple[str, str, str, str], dict[str, list[Record]]] = {}
    for one in run["records"]:
        if one["kind"] == "scaling":
            key = (one["op"], one["shape"], one["profile"], one["axis"])
            points.setdefault(key, {}).setdefault(one["provider"], []).append(one)
    return {key: [_line(*item) for item in _ours_first(lines)] for key, lines in points.items()}


def _ours_first(lines: dict[str, list[Record]]) -> list[tuple[str, list[Record]]]:
    return sorted(lines.items(), key=lambda item: (item[0] != OURS, item[0] == FLOOR))


def _line(provider: str, points: list[Record]) -> Line:
    points = sorted(points, key=lambda one: one["value"])
    bare = Line(provider, points, None, None)
    time, memory = (power(*bare.series(name)) for name in ("total_ms", "extra_bytes"))
    return Line(provider, points, time, memory)


def clock_ranges(run: Run) -> dict[str, tuple[float, float]]:
    """Return {name of a reading: (lowest, highest)} over all records."""
    readings: dict[str, list[float]] = {}

    def add(name: str, reading: Any) -> None:
        if isinstance(reading, dict):
            for inner, value in reading.items():
                add(inner, value)
        elif isinstance(reading, list):
            for value in reading:
                add(name, value)
        elif isinstance(reading, int | float):
            readings.setdefault(name, []).append(float(reading))

    for one in run["records"]:
        add("clock", one.get("clock"))
    return {name: (min(values), max(values)) for name, values in readings.items()}


def rounds(run: Run) -> tuple[int, int] | None:
    """Return the fewest and the most timed rounds of a provider."""
    times = [one.get("total_ms") for one in run["records"] if one["kind"] == "speed"]
    counts = [len(samples(value)) for value in times if value]
    return (min(counts), max(counts)) if counts else None
