"""Lists where ours loses: one sentence for every case in which a peer is better."""

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
from bench.results_file import OURS

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
    unsorted = [
        loss
        for group in shapes
        for op in group.cases
        for case in group.cases[op]
        if case.provider not in FLOORS
        for loss in _of_case(group, case, group.find(op, OURS))
    ]
    by_kind = {
        kind: sorted((one for one in unsorted if one.kind == kind), key=lambda one: one.share)
        for kind in KINDS
    }
    return {kind: some for kind, some in by_kind.items() if some}


def _of_case(
    group: ShapeFigures, case: ProviderFigures, ours: ProviderFigures | None
) -> list[Loss]:
    where = f"{case.op} ({group.shape}, {group.profile}): {case.provider}"
    losses_of_case: list[Loss] = []
    if case.provider == OURS:
        return _target(group, case)
    if case.total and (ours is None or ours.total is None):
        why = "not run" if ours is None else one_line(ours.status)
        sentence = f"{where} takes {number(case.total.median)} ms, ours: {why}."
        losses_of_case.append(Loss("missing", 0.0, sentence))
    if ours is None:
        return losses_of_case
    if case.per_ours and case.per_ours.median < 1:
        losses_of_case.append(
            Loss("time", case.per_ours.median, _time(where, case.per_ours, case, ours))
        )
    if case.extra_bytes and ours.extra_bytes and holds_less(case.extra_bytes, ours.extra_bytes):
        both = (megabytes(case.extra_bytes), megabytes(ours.extra_bytes))
        share = case.extra_bytes / ours.extra_bytes
        sentence = f"{where} holds {both[0]} MB extra against {both[1]} MB: {times(share)} of ours."
        losses_of_case.append(Loss("memory", share, sentence))
    dx, our_dx = error(case, "dhidden", "max"), error(ours, "dhidden", "max")
    if dx is not None and our_dx and dx < our_dx:
        both = (scientific(dx), scientific(our_dx))
        sentence = f"{where} has an error of {both[0]} in dX against {both[1]}."
        losses_of_case.append(Loss("accuracy", dx / our_dx, sentence))
    return losses_of_case


def _target(group: ShapeFigures, case: ProviderFigures) -> list[Loss]:
    bar, ratio = target(group, case.op), case.per_floor
    if bar is None or ratio is None or ratio.median <= bar:
        return []
    where = f"{case.op} ({group.shape}, {group.profile})"
    sentence = (
        f"{where}: ours takes {times(ratio.median)} of the floor "
        f"(quartiles {times(ratio.low)}-{times(ratio.high)}), target {times(bar)}."
    )
    return [Loss("target", bar / ratio.median, sentence)]


def _time(where: str, ratio: Spread, case: ProviderFigures, ours: ProviderFigures) -> str:
    figures = f"{median(case.total)} ms against {median(ours.total)} ms"
    text = f"{where} takes {figures}: {ratio_text(ratio)} of our time"
    if not ratio.paired:
        return f"{text} (timed in another run)."
    unsure = ", so it may be noise" if ratio.high >= 1 else ""
    return f"{text} (quartiles {times(ratio.low)}-{times(ratio.high)}{unsure})."
