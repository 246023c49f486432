"""Reads run folders: settings, columns of metrics.jsonl, events and samples."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_train.config_file import load_yaml
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.events import FILE as EVENTS
from kdrl_train.runfolder.jsonl import Record
from kdrl_train.runfolder.log import read_records
from kdrl_train.tools.report.rows import EVENT, SAMPLE, STEP, drawn

APART = ("seed", "out", "resume")
"""Settings that may differ between the runs of a group."""


@dataclass(frozen=True)
class Column:
    """Holds one number of a run over its steps."""

    steps: np.ndarray
    """[K] optimiser steps done, from 1, whose records have the key."""
    values: np.ndarray
    """[K] float64, NaN where the record has null."""


@dataclass(frozen=True)
class RunData:
    """Holds what is in a run folder so far."""

    folder: Path
    settings: dict[str, Any]
    """Dotted key -> value."""
    records: list[Record]
    """The lines of metrics.jsonl."""
    events: list[Record]
    damaged: list[str] = field(default_factory=list)
    """What was left out: a message for each damaged line of a file that was read."""

    @property
    def seed(self) -> Any:
        """Returns the seed; None if the settings have none."""
        return self.settings.get("seed")

    @property
    def steps(self) -> int:
        """Counts the optimiser steps that are done."""
        return self.records[-1]["step"] + 1 if self.records else 0

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Returns a column for every key whose values are numbers or null, without the step."""
        columns = {}
        for key in dict.fromkeys(key for r in self.records for key in r if key != "step"):
            records = [record for record in self.records if key in record]
            values = [record[key] for record in records]
            if not any(isinstance(value, list) for value in values):
                steps = np.array([record["step"] + 1 for record in records])
                columns[key] = Column(steps, np.array(values, dtype=float))  # null becomes NaN
        return columns

    def counts(self, key: str, share: float, *, late: bool) -> list[int]:
        """Sums the counts of a key over the first, or the last, `share` of its steps."""
        counts = [record[key] for record in self.records if record.get(key)]
        number = tail(len(counts), share)
        part = counts[-number:] if late else counts[:number]
        part = [numbers for numbers in part if len(numbers) == len(part[-1])]
        return [int(n) for n in np.sum(part, axis=0)] if part else []

    @cached_property
    def sampled(self) -> list[int]:
        """Lists the steps (from 0) whose samples were saved."""
        names = (path.stem[5:] for path in self.folder.glob("samples/step_*.jsonl"))
        return sorted(int(name) for name in names if name.isdecimal())

    def samples(self, step: int) -> list[Record]:
        """Reads the samples of a step, counted from 0."""
        path = self.folder / "samples" / f"step_{step:06d}.jsonl"
        return drawn(jsonl.read(path, self.damaged.append), SAMPLE, path, self.damaged.append)

    @property
    def status(self) -> str:
        """Says how the run ended, as far as its files show."""
        ends = ("started", "resumed", "finished", "stopped", "failed")
        last = next((e for e in reversed(self.events) if e.get("event") in ends), None)
        if last is not None and last["event"] in ("stopped", "failed"):
            return last["event"]
        total = self.settings.get("steps")
        if (last is not None and last["event"] == "finished") or self.steps == total:
            return "finished"
        return "no end recorded: still running, or killed"


def tail(count: int, share: float) -> int:
    """Returns how many steps are a share of `count` steps; at least 1."""
    return max(1, round(count * share))


def read(folder: Path) -> RunData:
    """Reads a run folder.

    Raises: ValueError for a folder without config.yaml, or with a broken one.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/config.yaml"))
        hint = f"; it holds the runs {', '.join(inside)}" if inside else ""
        raise ValueError(
            "a run must be a folder that `train` has written, with config.yaml, got "
            f"{folder}, which has none{hint}"
        )
    damaged: list[str] = []
    rows = read_records(folder, damaged.append)
    lines = jsonl.read(folder / EVENTS, damaged.append)
    records = drawn(rows, STEP, folder / "metrics.jsonl", damaged.append)
    events = drawn(lines, EVENT, folder / EVENTS, damaged.append)
    return RunData(folder, dict(_dotted(load_yaml(path))), records, events, damaged)


def _dotted(settings: dict[str, Any], key: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in settings.items():
        path = f"{key}.{name}" if key else str(name)
        if isinstance(value, dict):
            yield from _dotted(value, path)
        else:
            yield path, value


@dataclass(frozen=True)
class RunGroup:
    """Holds runs that are drawn as one line, their mean, with a band."""

    name: str
    look: int
    """Index of the group; it chooses colour, dashes and mark."""
    runs: list[RunData]

    def having(self, key: str) -> list[Column]:
        """Returns a column of each run that has a number in it."""
        columns = [run.columns[key] for run in self.runs if key in run.columns]
        return [column for column in columns if not np.isnan(column.values).all()]


def by_settings(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Groups runs whose settings differ in APART alone; a group is named after its folders.

    Raises: ValueError for a folder that is not a run, or is named twice.
    """
    groups: dict[str, list[Path]] = {}
    seen = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise ValueError(f"each run must be named once, got {folder} twice")
        seen.add(folder.resolve())
        settings = read(folder).settings
        key = repr(sorted((k, v) for k, v in settings.items() if k not in APART))
        groups.setdefault(key, []).append(folder)
    named: dict[str, list[Path]] = {}
    for runs in groups.values():
        name = _common_name(runs)
        if name in named:
            name = f"{name} ({runs[0]})"
        named[name] = runs
    return named


def _common_name(folders: list[Path]) -> str:
    """Returns what the folders' names begin with; for one folder, its name."""
    names = [folder.resolve().name for folder in folders]
    if len(names) == 1:
        return names[0]
    start = names[0]
    while not all(name.startswith(start) for name in names):
        start = start[:-1]
    start = start.rstrip("-_.0123456789")
    for ending in ("seed", "s"):
        cut = start.removesuffix(ending)
        if cut != start and cut[-1:] in "-_.":
            start = cut.rstrip("-_.")
    return start or f"{names[0]} and {len(names) - 1} more"
