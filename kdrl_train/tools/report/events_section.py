"""Shows the events of runs: those in events.jsonl, and those that only metrics.jsonl counts."""

from collections.abc import Sequence

import numpy as np

from kdrl_train.runfolder.jsonl import Record
from kdrl_train.tools.report.blocks import Block, Note, Section, Table
from kdrl_train.tools.report.runs import RunData, RunGroup

MOST = 40
"""Most events of one run that are shown: the first and the last ones."""
COUNTED = {
    "verifier_timeout": "verifier timeouts",
    "verifier_error": "failed rewards",
    "rewards_missing": "completions without a reward",
}


def section(groups: Sequence[RunGroup]) -> Section:
    """Makes a table of events, and one of the counts in metrics.jsonl."""
    runs = [run for group in groups for run in group.runs]
    lines = [line for run in runs for line in _events(run)]
    blocks: list[Block] = [Note("These runs recorded no events.")]
    if lines:
        blocks = [Table("", ("time (UTC)", "run", "step", "event", "message"), lines)]
    counts = [line for run in runs for line in _counts(run)]
    if counts:
        note = "Counted in metrics.jsonl. The sampler mismatch of each step is among the curves."
        blocks.append(Table("Counts", ("event", "run", "number", "steps"), counts, note))
    return Section("events", "Events", blocks)


def _events(run: RunData) -> list[list[str]]:
    undone = _undone(run.events)
    lines = [
        [
            str(event.get("time", "-"))[:19].replace("T", " "),
            str(run.folder),
            str(event.get("step", "-")),
            str(event.get("event", "-")),
            _message(event) + (" (a resume dropped this step)" if i in undone else ""),
        ]
        for i, event in enumerate(run.events)
    ]
    if len(lines) <= MOST:
        return lines
    omitted = ["", str(run.folder), "", "…", f"{len(lines) - MOST} more in events.jsonl"]
    return [*lines[: MOST // 2], omitted, *lines[-MOST // 2 :]]


def _message(event: Record) -> str:
    words = str(event.get("message", ""))
    if event.get("dropped"):
        words += f"; {event['dropped']} steps after the checkpoint were dropped"
    if (event.get("ranks") or 1) > 1:
        words += f"; {event['ranks']} ranks"
    return words


def _undone(events: Sequence[Record]) -> set[int]:
    """Returns the indices of events whose step a later resume dropped."""
    lowest, undone = float("inf"), set()
    for i in range(len(events) - 1, -1, -1):
        event = events[i]
        if event.get("step", 0) > lowest:
            undone.add(i)
        if event.get("event") == "resumed":
            lowest = min(lowest, event.get("step", lowest))
    return undone


def _counts(run: RunData) -> list[list[str]]:
    lines = []
    for key, name in COUNTED.items():
        column = run.columns.get(key)
        if column is not None and (count := int(np.nansum(column.values))):
            steps = column.steps[column.values > 0]
            lines.append([name, str(run.folder), f"{count:,}", _steps(steps.tolist())])
    for key in ("loss", "grad_norm", "reward"):
        column = run.columns.get(key)
        if column is not None and (count := int(np.isnan(column.values).sum())):
            steps = column.steps[np.isnan(column.values)]
            name = f"{key} is null (was not finite)"
            lines.append([name, str(run.folder), f"{count:,}", _steps(steps.tolist())])
    return lines


def _steps(steps: list[int]) -> str:
    shown = ", ".join(map(str, steps[:5]))
    return shown if len(steps) <= 5 else f"{shown}, … {steps[-1]} ({len(steps):,} steps)"
