"""Compares two runs of one machine, case by case: is this library slower than it was?

python -m bench.regress OLD NEW [--tolerance 0.1]

OLD and NEW are folders or files. Time is compared as ours / floor, in the same round, so that a
machine that is slower today is no regression. A case is slower when the median of that ratio grew
by more than the tolerance and the lower quartile of the new ratios is above the upper quartile of
the old ones. Extra memory grows by more than the tolerance, and 1 MB. A case that is wrong or fails
now is worse too. Exits with 1 if any case got worse, or if there is nothing to compare.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import results_file
from bench.reporting import figures
from bench.reporting.figures import ProviderFigures, Spread
from bench.reporting.tables import (
    Cell,
    FigureTable,
    TableRow,
    markdown,
    megabytes,
    name_of,
    one_line,
    times,
)
from bench.results_file import BOTH_OURS, OURS, Run

Key = tuple[str, str, str]
"""(op, which is ", sketch" too, shape, profile)."""


SLACK_BYTES = 1e6
"""Growth of memory that may be the allocator's."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of one figure of one case."""

    case: Key
    what: str
    """"time / floor" or "extra MB"."""
    old: str
    new: str
    growth: float
    """new / old."""
    worse: bool


def compare(old: Run, new: Run, tolerance: float) -> tuple[list[Change], list[str]]:
    """Return (changes, sentences about the cases that are not in the new run any more).

    Raises: ValueError where the runs are not of one machine with the same versions.
    """
    results_file.merge([old, new])  # for its check
    before, after = _cases(old), _cases(new)
    changes, vanished = [], []
    for key, case in before.items():
        now = after.get(key)
        for what in ("time / floor", "extra MB"):
            is_time = what == "time / floor"
            was = _spread(case.per_floor) if is_time else megabytes(case.extra_bytes)
            if not was:
                continue  # there was nothing to compare with
            change = now and (_time if is_time else _memory)(key, case, now, tolerance)
            why = _why(now, is_time)
            if change:
                changes.append(change)
            elif why.startswith(("differs", "failed")):
                changes.append(Change(key, what, was, why, math.inf, True))
            else:
                vanished.append(f"{_name(key)}: {what} has vanished ({why})")
    return changes, vanished


def _cases(run: Run) -> dict[Key, ProviderFigures]:
    """Return the figures of this library, by case."""
    ours = {}
    for shape_figures in figures.groups(run):
        for op in shape_figures.cases:
            for name in BOTH_OURS:
                figures_of_ours = shape_figures.find(op, name)
                if figures_of_ours:
                    case = name_of(op, name), shape_figures.shape, shape_figures.profile
                    ours[case] = figures_of_ours
    return ours


def _time(key: Key, old: ProviderFigures, new: ProviderFigures, tolerance: float) -> Change | None:
    a, b = old.per_floor, new.per_floor
    if a is None or b is None:
        return None
    growth = b.median / a.median
    worse = growth > 1 + tolerance and b.low > a.high
    return Change(key, "time / floor", _spread(a), _spread(b), growth, worse)


def _memory(
    key: Key, old: ProviderFigures, new: ProviderFigures, tolerance: float
) -> Change | None:
    a, b = old.extra_bytes, new.extra_bytes
    if a is None or b is None:
        return None
    growth = b / a if a > 0 else 1.0 if b <= a else float("inf")
    return Change(
        key,
        "extra MB",
        megabytes(a),
        megabytes(b),
        growth,
        growth > 1 + tolerance and b - a > SLACK_BYTES,
    )


def _why(now: ProviderFigures | None, is_time: bool) -> str:
    if now is None:
        return "not in the new run"
    status = now.status if is_time else now.memory_status
    return one_line(status) if status and status != "ok" else "no such figure in the new run"


def _spread(ratio: Spread | None) -> str:
    if ratio is None:
        return ""
    return f"{times(ratio.median)} ({times(ratio.low)}-{times(ratio.high)})"


def _name(key: Key) -> str:
    op, shape, profile = key
    return f"{op} ({shape}, {profile})"


def as_text(changes: list[Change], vanished: list[str]) -> str:
    """Write a table of all changes, then what vanished, then the verdict."""
    rows = []
    for one in changes:
        verdict = "" if not one.worse else "slower" if one.what == "time / floor" else "more memory"
        wrong = one.growth == math.inf
        change = ("", "no figure") if wrong else (f"{one.growth - 1:+.1%}", verdict)
        cells = (_name(one.case), one.what, one.old, one.new, *change)
        rows.append(TableRow(tuple(Cell(text) for text in cells)))
    columns = ("case", "figure", "old (quartiles)", "new (quartiles)", "change", "verdict")
    table = markdown(FigureTable(f"{OURS}: old and new", columns, tuple(rows)))
    worse = sum(one.worse for one in changes)
    return "\n".join([table, "", *vanished, f"{worse} of {len(changes)} figures got worse."])


def main() -> int:
    """Compare, print, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="0.1: 10%% is no regression")
    args = parser.parse_args()
    try:
        old, new = (results_file.load(path) for path in (args.old, args.new))
        changes, vanished = compare(old, new, args.tolerance)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(as_text(changes, vanished))
    if not changes:
        print("There is nothing to compare.")
    return int(not changes or any(one.worse for one in changes))


if __name__ == "__main__":
    sys.exit(main())
