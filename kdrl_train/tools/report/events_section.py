"""The events of runs: those they noted, and those that only their rows show."""

from collections.abc import Sequence

import numpy as np

from kdrl_train.runfolder.jsonl import Record
from kdrl_train.tools.report.blocks import Block, Note, Section, Table
from kdrl_train.tools.report.runs import Group, RunData

MOST = 40
"""Rows of one run; of more, the first and the last."""
COUNTED = {
    "verifier_timeout": "verifier timeouts",
    "verifier_error": "failed rewards",
    "rewards_missing": "completions without a reward",
}


def section(groups: Sequence[Group]) -> Section:
    """A table of events, and one of what the rows count."""
    runs = [run for group in groups for run in group.runs]
    rows = [row for run in runs for row in _rows(run)]
    blocks: list[Block] = [Note("These runs have noted none.")]
    if rows:
        blocks = [Table("", ("time (UTC)", "run", "step", "event", "what"), rows)]
    counted = [row for run in runs for row in _counted(run)]
    if counted:
        note = "Counts of the rows of metrics.jsonl. The engine's gap at each step is among Curves."
        blocks.append(Table("In the rows", ("what", "run", "number", "steps"), counted, note))
    return Section("events", "Events", blocks)


def _rows(run: RunData) -> list[list[str]]:
    undone = _undone(run.events)
    rows = [
        [
            str(event.get("time", "-"))[:19].replace("T", " "),
            str(run.folder),
            str(event.get("step", "-")),
            str(event.get("event", "-")),
            _what(event) + (" (of steps that were dropped by a resume)" if i in undone else ""),
        ]
        for i, event in enumerate(run.events)
    ]
    if len(rows) <= MOST:
        return rows
    left = ["", str(run.folder), "", "…", f"{len(rows) - MOST} more, in events.jsonl"]
    return [*rows[: MOST // 2], left, *rows[-MOST // 2 :]]


def _what(event: Record) -> str:
    words = str(event.get("message", ""))
    if event.get("dropped"):
        words += f"; {event['dropped']} rows after its checkpoint were dropped"
    if (event.get("ranks") or 1) > 1:
        words += f"; {event['ranks']} ranks"
    return words


def _undone(events: Sequence[Record]) -> set[int]:
    """Indices of events of steps that a later resume dropped."""
    lowest, found = float("inf"), set()
    for i in range(len(events) - 1, -1, -1):
        event = events[i]
        if event.get("step", 0) > lowest:
            found.add(i)
        if event.get("event") == "resumed":
            lowest = min(lowest, event.get("step", lowest))
    return found


def _counted(run: RunData) -> list[list[str]]:
    rows = []
    for key, what in COUNTED.items():
        column = run.columns.get(key)
        if column is not None and (count := int(np.nansum(column.values))):
            steps = column.steps[column.values > 0]
            rows.append([what, str(run.folder), f"{count:,}", _steps(steps.tolist())])
    for key in ("loss", "grad_norm", "reward"):
        column = run.columns.get(key)
        if column is not None and (count := int(np.isnan(column.values).sum())):
            steps = column.steps[np.isnan(column.values)]
            what = f"{key} is null (was not finite)"
            rows.append([what, str(run.folder), f"{count:,}", _steps(steps.tolist())])
    return rows


def _steps(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[:5]))
    return shown if len(steps) <= 5 else f"{shown}, … {steps[-1]} ({len(steps):,} steps)"
