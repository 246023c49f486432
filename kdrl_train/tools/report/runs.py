"""Run folders as numbers: settings, columns of metrics.jsonl, events, samples."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kdrl_train.config_file import load_yaml
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.events import FILE as EVENTS
from kdrl_train.runfolder.jsonl import Record

APART = ("seed", "out", "resume")
"""Settings in which runs of one group may differ."""


@dataclass(frozen=True)
class Column:
    """One number over a run's steps."""

    steps: np.ndarray
    """[K] optimiser steps done, from 1: those whose rows have the key."""
    values: np.ndarray
    """[K] float64, NaN where the row says null."""


@dataclass(frozen=True)
class RunData:
    """One run folder, as far as it was written."""

    folder: Path
    settings: dict[str, Any]
    """Dotted key -> value."""
    rows: list[Record]
    events: list[Record]

    @property
    def seed(self) -> Any:
        """As in its settings; None where they do not say."""
        return self.settings.get("seed")

    @property
    def steps(self) -> int:
        """Optimiser steps that are done."""
        return self.rows[-1]["step"] + 1 if self.rows else 0

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Every key of its rows that holds numbers (or null), but the step."""
        found = {}
        for key in dict.fromkeys(key for row in self.rows for key in row if key != "step"):
            rows = [row for row in self.rows if key in row]
            values = [row[key] for row in rows]
            if not any(isinstance(value, (list, str)) for value in values):
                steps = np.array([row["step"] + 1 for row in rows])
                found[key] = Column(steps, np.array(values, dtype=float))  # null becomes NaN
        return found

    def counts(self, key: str, share: float, *, late: bool) -> list[int]:
        """Sum of a column of counts over the first, or the last, `share` of its steps."""
        rows = [row[key] for row in self.rows if row.get(key)]
        some = rows[-tail(len(rows), share) :] if late else rows[: tail(len(rows), share)]
        return [int(n) for n in np.sum(some, axis=0)] if some else []

    @cached_property
    def sampled(self) -> list[int]:
        """Steps (from 0) of which there are samples."""
        return sorted(int(p.stem.split("_")[1]) for p in self.folder.glob("samples/step_*.jsonl"))

    def samples(self, step: int) -> list[Record]:
        """Lines of a step's samples; step from 0."""
        return jsonl.read(self.folder / "samples" / f"step_{step:06d}.jsonl")

    @property
    def status(self) -> str:
        """How it ended, as far as its files tell."""
        ends = ("started", "resumed", "finished", "stopped", "failed")
        last = next((e for e in reversed(self.events) if e.get("event") in ends), None)
        if last is not None and last["event"] in ("stopped", "failed"):
            return last["event"]
        total = self.settings.get("steps")
        if (last is not None and last["event"] == "finished") or self.steps == total:
            return "finished"
        return "no end recorded: it runs, or was killed"


def tail(count: int, share: float) -> int:
    """How many of so many steps are a share of them; at least 1."""
    return max(1, round(count * share))


def read(folder: Path) -> RunData:
    """A run folder. Raises: ValueError for a folder that is none, or with a broken config.yaml."""
    path = folder / "config.yaml"
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/config.yaml"))
        hint = f": it holds the runs {', '.join(inside)}" if inside else ""
        raise ValueError(
            "a run must be a folder that `train` has written, with config.yaml, got "
            f"{folder}, which has none{hint}"
        )
    rows = [row for row in jsonl.read(folder / "metrics.jsonl") if "step" in row]
    return RunData(folder, dict(_dotted(load_yaml(path))), rows, jsonl.read(folder / EVENTS))


def _dotted(settings: dict[str, Any], key: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in settings.items():
        path = f"{key}.{name}" if key else str(name)
        if isinstance(value, dict):
            yield from _dotted(value, path)
        else:
            yield path, value


@dataclass(frozen=True)
class Group:
    """Runs that are drawn as one: their mean, and how far they are apart."""

    name: str
    look: int
    """Index among the groups."""
    runs: list[RunData]

    def having(self, key: str) -> list[Column]:
        """A column of those runs that have a number in it."""
        found = [run.columns[key] for run in self.runs if key in run.columns]
        return [column for column in found if not np.isnan(column.values).all()]


def by_settings(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Runs whose settings differ in APART alone, together, by a name made of their folders' names.

    Raises: ValueError for a folder that is no run, or is given twice.
    """
    found: dict[str, list[Path]] = {}
    seen = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise ValueError(f"each run must be given once, got {folder} twice")
        seen.add(folder.resolve())
        settings = read(folder).settings
        key = repr(sorted((k, v) for k, v in settings.items() if k not in APART))
        found.setdefault(key, []).append(folder)
    named: dict[str, list[Path]] = {}
    for runs in found.values():
        name = _common_name(runs)
        if name in named:
            name = f"{name} ({runs[0]})"
        named[name] = runs
    return named


def _common_name(folders: list[Path]) -> str:
    """What the folders' names begin with; of one, its name."""
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
