"""What a run leaves behind: metrics.jsonl, events.jsonl, samples/, and a console line a step."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.events import Events
from kdrl_train.runfolder.jsonl import Record
from kdrl_train.runfolder.trackers import Trackers

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

BESIDE = ("eval", "diagnostics")
"""Stages that are no part of a training step: their seconds do not count for its speed."""
WITHOUT_TOKENS = ("sync", "wait")
"""Stages of a step that handle no tokens, so that they have no speed of their own."""


class Stages:
    """Wall-clock seconds of each stage of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block; blocks of one name add up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # kernels of this stage would count for the next
            self.add(name, since=start)

    def add(self, name: str, since: float) -> None:
        """Time from `since`, of time.perf_counter, until now."""
        elapsed = time.perf_counter() - since
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def metrics(self, tokens: int) -> dict[str, float]:
        """Seconds, and `tokens` (those of the step's completions) per second, in all and of each
        stage that handles them; the stages of BESIDE have no part in the latter."""
        step = {name: value for name, value in self.seconds.items() if name not in BESIDE}
        return {
            "tokens_per_s": tokens / sum(step.values()),
            **{
                f"tokens_per_s_{name}": tokens / value
                for name, value in step.items()
                if name not in WITHOUT_TOKENS
            },
            "seconds": sum(self.seconds.values()),
            **{f"seconds_{name}": value for name, value in self.seconds.items()},
        }


def peak_memory_bytes(device: torch.device) -> float | None:
    """Most memory in use: on a GPU, allocated there since the last reset; else of this process
    since its start (None on Windows, which does not say)."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class RunLog:
    """The log of one run folder.

    Args:
        folder: the run folder; made if absent.
        first_step: step the run starts at. Rows and samples of this step and later, which a killed
            run wrote after its last checkpoint, are removed, and so is a torn last line.
        steps: steps in all, for the console.
        console: where lines go; None: standard output.
        writes: False on all ranks but the first: nothing is written or printed.
        trackers: started; they get every row too.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        steps: int,
        console: Console | None = None,
        writes: bool = True,
        trackers: Trackers | None = None,
    ) -> None:
        self.folder = folder
        self.writes = writes
        self.trackers = trackers
        self.steps = steps
        self.console = Console(highlight=False) if console is None else console
        self.metrics_path = folder / "metrics.jsonl"
        self.done = first_step
        """Optimiser steps of which there is a row."""
        self.dropped = 0
        """Rows that were removed."""
        if not writes:
            return
        self.postponed_path = folder / "postponed.jsonl"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        rows = read_records(folder)
        kept = [row for row in rows if row["step"] < first_step]
        jsonl.write(self.metrics_path, kept)
        for path in (folder / "samples").glob("step_*.jsonl"):
            if path.name >= _samples_name(first_step):
                path.unlink()
        self.dropped = len(rows) - len(kept)
        self.events = Events(folder)

    def step(self, row: dict[str, Any]) -> None:
        """Append one step's metrics and print its line. A number that is not finite becomes null
        in the file: JSON has no NaN."""
        if not self.writes:
            return
        jsonl.append(self.metrics_path, row)
        self.done = row["step"] + 1
        if self.trackers is not None:
            self.trackers.log(row)
        width = self.console.width if self.console.is_terminal else None
        self.console.print(_line(row, self.steps, width), soft_wrap=True)

    def postpone(self, row: dict[str, Any]) -> None:
        """Keep a step's row aside, outside of metrics.jsonl: its evaluation is still to come."""
        if self.writes:
            jsonl.write(self.postponed_path, [row])

    def postponed(self, step: int) -> dict[str, Any] | None:
        """The row kept aside, if it is of this step and metrics.jsonl lacks it."""
        logged = {other["step"] for other in read_records(self.folder)}
        rows = jsonl.read(self.postponed_path)
        return next((row for row in rows if row["step"] == step and step not in logged), None)

    def say(self, message: str) -> None:
        """One line on the console, nothing in the files."""
        if self.writes:
            self.console.print(Text(message), soft_wrap=True)

    def event(self, kind: str, message: str, *, say: bool = True, **more: Any) -> None:
        """A row of events.jsonl; on the console too unless not `say`. From any thread."""
        if self.writes:
            self.events.add(self.done, kind, message, **more)
        if say:
            self.say(message)

    def samples(self, step: int, rows: list[Record]) -> None:
        """Write a step's samples, if there are any, to samples/step_XXXXXX.jsonl."""
        if self.writes and rows:
            jsonl.write(self.folder / "samples" / _samples_name(step), rows)


def read_records(folder: Path) -> list[Record]:
    """Rows of metrics.jsonl in a run folder; a torn line (the process was killed) ends them."""
    return jsonl.read(folder / "metrics.jsonl")


def _samples_name(step: int) -> str:
    return f"step_{step:06d}.jsonl"


def _line(row: dict[str, Any], steps: int, width: int | None) -> Text:
    """One step: what went in, how it went, what it cost. In a terminal of `width` columns it goes
    on, indented, where the next number would not fit; None: it stays one line, as files want it."""
    head = f"step {row['step'] + 1:{len(str(steps))}d}/{steps}"
    line, column = Text(head, style="bold"), len(head)
    for name, value in [*_step_parts(row), *_eval_parts(row)]:
        size = len(name) + len(value) + 3
        if width is not None and column + size > width:
            line.append("\n" + " " * len(head))
            column = len(head)
        line.append(f"  {name} ", style="dim").append(value)
        column += size
    return line


def _step_parts(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("reward", f"{row['reward']:.3f}"),
        ("right", f"{row['accuracy']:.1%}"),
        ("signal", f"{row['groups_with_signal']:.0%}"),
        ("tokens", f"{row['response_length']:.0f}"),
        ("cut", f"{row['truncated']:.0%}"),
        ("entropy", _number(row["entropy"], ".3f")),
        ("KL", _number(row["kl_teacher"], ".4f")),
        ("beta", _number(row["kd_coef"], ".1e")),
        ("loss", f"{row['loss']:+.2e}"),
        ("|g|", f"{row['grad_norm']:.2f}"),
        ("tok/s", f"{row['tokens_per_s']:.0f}"),
        ("s", f"{row['seconds']:.1f}"),
    ]


def _eval_parts(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The shares of an evaluation with their intervals, where the row has them, in percent."""
    parts = []
    for name in ("avg", "pass", "maj"):
        key = f"eval_{name}_at_k"
        if key in row:
            low, high = 100 * row[f"{key}_low"], 100 * row[f"{key}_high"]
            parts.append((f"{name}@k", f"{row[key]:.1%} ({low:.1f}-{high:.1f})"))
    return parts


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
