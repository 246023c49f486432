"""Lists where ours loses: one sentence for every case in which a peer is better.

Our sketch is another algorithm: where peers, or our exact gradient, are better than it is said too,
except for its error, which is noise by design.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.ops import FLOORS
from bench.reporting.figures import ProviderFigures, ShapeFigures, Spread
from bench.reporting.tables import (
    error,
    holds_less,
    median,
    megabytes,
    number,
    one_line,
    ratio_text,
    scientific,
    target,
    times,
)
from bench.results_file import BOTH_OURS, OURS, SKETCH

KINDS = {
    "missing": "No figure of ours",
    "target": "Above the target ratio to the floor",
    "time": "Slower",
    "memory": "More memory",
    "accuracy": "Less accurate dX",
}
"""Headings, in their order."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss: a case that a peer wins, or that misses its target."""

    kind: str
    """One of KINDS."""
    share: float
    """The peer's figure (or the target) / ours, below 1; 0 where we have no figure."""
    sentence: str


def losses(shapes: list[ShapeFigures]) -> dict[str, list[Loss]]:
    """List losses by kind, the worst first; kinds without a loss are left out."""
    unsorted = [loss for group in shapes for op in group.cases for loss in _of_op(group, op)]
    by_kind = {
        kind: sorted((one for one in unsorted if one.kind == kind), key=lambda one: one.share)
        for kind in KINDS
    }
    return {kind: some for kind, some in by_kind.items() if some}


def _of_op(group: ShapeFigures, op: str) -> Iterator[Loss]:
    ours, sketch = (group.find(op, name) for name in BOTH_OURS)
    for case in group.cases[op]:
        if case.provider in BOTH_OURS:
            yield from _target(group, case)
        elif case.provider not in FLOORS:
            yield from _of_case(group, case, ours)
        if sketch and sketch.total and case.provider not in (*FLOORS, SKETCH):
            yield from _of_case(group, case, sketch)
    if sketch and not sketch.total and not sketch.status.startswith("not supported"):
        sentence = f"{op} ({group.shape}, {group.profile}): our sketch: {one_line(sketch.status)}."
        yield Loss("missing", 0.0, sentence)


def _of_case(
    group: ShapeFigures, case: ProviderFigures, ours: ProviderFigures | None
) -> list[Loss]:
    where = f"{case.op} ({group.shape}, {group.profile}): {case.provider}"
    losses_of_case: list[Loss] = []
    if case.total and (ours is None or ours.total is None):
        why = "not run" if ours is None else one_line(ours.status)
        sentence = f"{where} takes {number(case.total.median)} ms, ours: {why}."
        losses_of_case.append(Loss("missing", 0.0, sentence))
    if ours is None:
        return losses_of_case
    ratio = case.per(ours.provider)
    if ratio and ratio.median < 1:
        losses_of_case.append(Loss("time", ratio.median, _time(where, ratio, case, ours)))
    if case.extra_bytes and ours.extra_bytes and holds_less(case.extra_bytes, ours.extra_bytes):
        both = (megabytes(case.extra_bytes), megabytes(ours.extra_bytes))
        share = case.extra_bytes / ours.extra_bytes
        whose = "our sketch's" if ours.provider == SKETCH else "ours"
        sentence = (
            f"{where} holds {both[0]} MB extra against {both[1]} MB: {times(share)} of {whose}."
        )
        losses_of_case.append(Loss("memory", share, sentence))
    dx, our_dx = error(case, "dhidden", "max"), error(ours, "dhidden", "max")
    if ours.provider == OURS and dx is not None and our_dx and dx < our_dx:
        both = (scientific(dx), scientific(our_dx))
        sentence = f"{where} has an error of {both[0]} in dX against {both[1]}."
        losses_of_case.append(Loss("accuracy", dx / our_dx, sentence))
    return losses_of_case


def _target(group: ShapeFigures, case: ProviderFigures) -> list[Loss]:
    bar, ratio = target(group, case.op, case.provider), case.per_floor
    if bar is None or ratio is None or ratio.median <= bar:
        return []
    where = f"{case.op} ({group.shape}, {group.profile})"
    whose = "our sketch" if case.provider == SKETCH else "ours"
    sentence = (
        f"{where}: {whose} takes {times(ratio.median)} of the floor "
        f"(quartiles {times(ratio.low)}-{times(ratio.high)}), target {times(bar)}."
    )
    return [Loss("target", bar / ratio.median, sentence)]


def _time(where: str, ratio: Spread, case: ProviderFigures, ours: ProviderFigures) -> str:
    figures = f"{median(case.total)} ms against {median(ours.total)} ms"
    whose = "our sketch's" if ours.provider == SKETCH else "our"
    text = f"{where} takes {figures}: {ratio_text(ratio)} of {whose} time"
    if not ratio.paired:
        return f"{text} (timed in another run)."
    unsure = ", so it may be noise" if ratio.high >= 1 else ""
    return f"{text} (quartiles {times(ratio.low)}-{times(ratio.high)}{unsure})."
