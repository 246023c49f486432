"""Writes what a run reports: metrics.jsonl, events.jsonl, samples/, and a console line a step."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from kdrl_train import output
from kdrl_train.errors import written
from kdrl_train.output import guarded_console, hours, loss
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.doubts import Doubts
from kdrl_train.runfolder.events import Events
from kdrl_train.runfolder.jsonl import Record
from kdrl_train.runfolder.lock import RunLock
from kdrl_train.runfolder.trackers import Trackers

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

OUTSIDE_THE_STEP = ("eval", "diagnostics")
"""Stages that only measure: their seconds do not count for the speed of a training step."""
ETA_STEPS = 20
"""Steps, at most, whose mean time predicts that of the steps that are left."""
WITHOUT_TOKENS = ("sync", "wait")
"""Stages of a step that handle no tokens, so that they have no speed of their own."""


ROLLOUTS, LEARNING = "rollouts", "learning"
SHOWN = {
    "rollout": ROLLOUTS,
    "verify": "rewards",
    "score": "log-probabilities",
    "update": LEARNING,
    "sync": "weights to the engine",
}
"""Stages that the screen shows, by their names there. The teacher's, which alternates with the
update's, is not among them."""


class Stages:
    """Measures the wall-clock seconds of each stage of one step.

    On a GPU a stage lasts from when the GPU begins with it until it has ended it: the host, which
    is ahead of it, waits at `settle` alone.

    shown: whether the screen shows the stages: those of a thread beside the step's are not.
    """

    def __init__(self, shown: bool = False) -> None:
        self.shown = shown
        self.seconds: dict[str, float] = {}
        self._queued: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block; the seconds of blocks with the same name add up."""
        if self.shown and name in SHOWN:
            output.begin(SHOWN[name])
        if torch.cuda.is_available():
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            try:
                yield
            finally:
                ended.record()
                self._queued.append((name, begun, ended))
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, since=start)

    def settle(self) -> None:
        """Wait for the GPU, and count the stages that it has ended since the last time."""
        if self._queued:
            self._queued[-1][2].synchronize()  # the others, of the same stream, ended before it
        for name, begun, ended in self._queued:
            self.seconds[name] = self.seconds.get(name, 0.0) + begun.elapsed_time(ended) / 1000
        self._queued.clear()

    def add(self, name: str, since: float) -> None:
        """Add the time from `since`, a value of time.perf_counter, until now."""
        elapsed = time.perf_counter() - since
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def metrics(self, tokens: int) -> dict[str, float]:
        """Return the seconds and the tokens per second, of the step and of each stage.

        tokens: how many tokens the step's completions have. The stages of OUTSIDE_THE_STEP have
            seconds, but no part in the speed.
        """
        self.settle()
        of_step = {
            name: value for name, value in self.seconds.items() if name not in OUTSIDE_THE_STEP
        }
        return {
            "tokens_per_s": tokens / sum(of_step.values()),
            **{
                f"tokens_per_s_{name}": tokens / value
                for name, value in of_step.items()
                if name not in WITHOUT_TOKENS
            },
            "seconds": sum(self.seconds.values()),
            **{f"seconds_{name}": value for name, value in self.seconds.items()},
        }


def peak_memory_bytes(device: torch.device) -> float | None:
    """Return the largest amount of memory in use so far.

    On a GPU it is the memory allocated there since the last reset of its statistics; elsewhere
    that of this process since its start, or None on Windows, which does not report it.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class RunLog:
    """Writes the log of one run folder.

    Args:
        folder: the run folder; made if absent.
        first_step: the step at which the run starts. Records and samples of this step and later,
            which a killed run wrote after its last checkpoint, are removed, and so is a torn line.
        steps: how many steps the run has in all, for the console.
        console: where lines are printed; None: standard output.
        writes: False on all ranks but rank 0: nothing is written or printed.
        trackers: get every record too; already started.
        lock: of the run folder, which is written only while it is this run's; None: always.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        steps: int,
        console: Console | None = None,
        writes: bool = True,
        trackers: Trackers | None = None,
        lock: RunLock | None = None,
    ) -> None:
        self.folder = folder
        self.writes = writes
        self.lock = lock
        self.trackers = trackers
        self.steps = steps
        self.console = guarded_console(console)
        self.metrics_path = folder / "metrics.jsonl"
        self.postponed_path = folder / "postponed.jsonl"
        self.steps_done = first_step
        """Optimiser steps that are done, for events."""
        self.dropped_records = 0
        """How many records of metrics.jsonl were removed."""
        self._logged: set[int] = set()
        self._ends: deque[float] = deque(maxlen=ETA_STEPS + 1)  # of steps, time.monotonic
        self._console_lost = False
        self.doubts = Doubts()
        if not writes:
            return
        with written(folder / "samples"):
            (folder / "samples").mkdir(parents=True, exist_ok=True)
        records = read_records(folder)
        kept = [record for record in records if record["step"] < first_step]
        jsonl.keep(self.metrics_path, len(kept))
        for path in (folder / "samples").glob("step_*.jsonl"):
            if path.name >= _samples_name(first_step):
                path.unlink()
        self.dropped_records = len(records) - len(kept)
        self._logged = {record["step"] for record in kept}
        for record in kept:
            self.doubts.add(record)  # it was said then
        self.events = Events(folder)
        if lock is not None and lock.unsupported is not None:
            self.event("warning", lock.unsupported)

    def require_ours(self) -> None:
        """Raise RunError where another run has begun in the folder."""
        if self.lock is not None:
            self.lock.require_ours()

    def step(self, record: Record) -> None:
        """Append one step's record to metrics.jsonl and print its line.

        A number that is not finite becomes null in the file, since JSON has no NaN.
        """
        if not self.writes:
            return
        self.require_ours()
        jsonl.append(self.metrics_path, record)
        self._logged.add(record["step"])
        self.steps_done = record["step"] + 1
        if self.trackers is not None:
            self.trackers.log(record)
        width = self.console.width if self.console.is_terminal else None
        self._print(_line(record, self.steps, width, self._seconds_left()))
        for doubt in self.doubts.add(record):
            self.event("warning", doubt)

    def _seconds_left(self) -> float | None:
        """Predict the seconds until the last step ends, at the end of one; None at the first.

        Each step that is left takes the mean time from the end of one step to that of the next, so
        with the evaluations and checkpoints between them; the first, which warms up, counts for
        nothing.
        """
        self._ends.append(time.monotonic())
        if len(self._ends) == 1:
            return None
        mean = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return mean * (self.steps - self.steps_done)

    def postpone(self, record: Record) -> None:
        """Keep a step's record in postponed.jsonl, since its evaluation is still to come."""
        if self.writes:
            self.require_ours()
            jsonl.write(self.postponed_path, [record])

    def postponed(self, step: int) -> Record | None:
        """Return the record that was postponed, if it is this step's and metrics.jsonl lacks it."""
        return None if step in self._logged else read_postponed(self.folder, step)

    def say(self, message: str) -> None:
        """Print one line on the console, and write nothing."""
        if self.writes:
            self._print(Text(message))

    def _print(self, text: Text) -> None:
        """Print on the console; where that fails the first time, note it in events.jsonl."""
        lost = None
        try:
            self.console.print(text, soft_wrap=True)
        except OSError as error:  # a full disk, say, behind `> log.txt`
            lost = error
        lost = lost or loss(self.console.file)
        if lost is not None and not self._console_lost:
            self._console_lost = True
            message = f"the console cannot be written ({lost}): the run goes on without it"
            self.event("console", message, say=False)

    def event(self, kind: str, message: str, *, say: bool = True, **more: Any) -> None:
        """Append an event to events.jsonl, and print its message if `say`; from any thread.

        It is printed alone where another run has begun in the folder.
        """
        if self.writes and (self.lock is None or self.lock.is_ours()):
            self.events.add(self.steps_done, kind, message, **more)
        if say:
            self.say(message)

    def samples(self, step: int, records: list[Record]) -> None:
        """Write a step's samples, if there are any, to samples/step_XXXXXX.jsonl."""
        if records and self.writes:
            self.require_ours()
            jsonl.write(self.folder / "samples" / _samples_name(step), records)


def read_records(folder: Path, damaged: Callable[[str], None] = jsonl.refuse) -> list[Record]:
    """Return the records of metrics.jsonl in a run folder, without a torn last line.

    damaged: called with a message for every line that is no record of a later step than those
        before it; the line is left out.
    Raises: ValueError for such a line, unless `damaged` returns.
    """
    path = folder / "metrics.jsonl"
    records: list[Record] = []
    for number, record in jsonl.numbered(path, damaged).items():
        step, least = record.get("step"), records[-1]["step"] + 1 if records else 0
        if type(step) is int and step >= least:
            records.append(record)
        else:
            must = f"a record of step {least} or later"
            damaged(jsonl.damage(path, number, must, f"step {step!r:.80}"))
    return records


def read_postponed(folder: Path, step: int) -> Record | None:
    """Return the record in postponed.jsonl, if it is of this step."""
    records = jsonl.read(folder / "postponed.jsonl")
    return next((record for record in records if record.get("step") == step), None)


def _samples_name(step: int) -> str:
    """Return the name of a step's file in samples/."""
    return f"step_{step:06d}.jsonl"


def _line(record: Record, steps: int, width: int | None, left: float | None) -> Text:
    """Return a step's console line; left: the predicted seconds of the steps that follow.

    In a terminal of `width` columns it is continued, indented, on another line where the next
    number would not fit; None: it stays one line, as it should in a file.
    """
    head = f"step {record['step'] + 1:{len(str(steps))}d}/{steps}"
    line, column = Text(head, style="bold"), len(head)
    eta = [] if left is None else [("left", hours(left))]
    for name, value in [*_step_parts(record), *eta, *_eval_parts(record)]:
        size = len(name) + len(value) + 3
        if width is not None and column + size > width:
            line.append("\n" + " " * len(head))
            column = len(head)
        line.append(f"  {name} ", style="dim").append(value)
        column += size
    return line


def _step_parts(record: Record) -> list[tuple[str, str]]:
    """Return (name, value) of each number of a training step on its line."""
    return [
        ("reward", f"{record['reward']:.3f}"),
        ("right", f"{record['accuracy']:.1%}"),
        ("signal", f"{record['groups_with_signal']:.0%}"),
        ("tokens", f"{record['response_length']:.0f}"),
        ("cut", f"{record['truncated']:.0%}"),
        ("entropy", _number(record["entropy"], ".3f")),
        ("KL", _number(record["kl_teacher"], ".4f")),
        ("beta", _number(record["kd_coef"], ".1e")),
        *_teacher_parts(record),
        ("loss", f"{record['loss']:+.2e}"),
        ("|g|", f"{record['grad_norm']:.2f}"),
        *_sketch_parts(record),
        ("tok/s", f"{record['tokens_per_s']:.0f}"),
        ("s", f"{record['seconds']:.1f}"),
    ]


def _teacher_parts(record: Record) -> list[tuple[str, str]]:
    """Return (name, value) of the KL to each of several teachers, and of their betas where they
    differ."""
    names = [key.partition("/")[2] for key in record if key.startswith("kl_teacher/")]
    betas = {record[f"kd_coef/{name}"] for name in names}
    parts = []
    for name in names:
        parts.append((f"KL {name}", _number(record[f"kl_teacher/{name}"], ".4f")))
        if len(betas) > 1:
            parts.append((f"beta {name}", _number(record[f"kd_coef/{name}"], ".1e")))
    return parts


def _sketch_parts(record: Record) -> list[tuple[str, str]]:
    """Return (name, value) of what a sketched head adds to the line of a step."""
    if "sketch_noise" not in record:
        return []
    return [
        ("noise", _number(record["sketch_noise"], ".2%")),
        ("entries", _number(record["sketch_entries"], ".0f")),
        ("flat", _number(record["sketch_flat_share"], ".0%")),
    ]


def _eval_parts(record: Record) -> list[tuple[str, str]]:
    """Return (name, value) of each score of an evaluation with its interval, if it was one: those
    of eval.data, and avg@k of each other set."""
    keys = {f"eval_{name}_at_k": f"{name}@k" for name in ("avg", "pass", "maj")}
    sets = [key for key in record if key.startswith("eval/") and key.endswith("/avg_at_k")]
    keys |= {key: key.split("/")[1] for key in sets}
    parts = []
    for key, name in keys.items():
        if key in record:
            low, high = 100 * record[f"{key}_low"], 100 * record[f"{key}_high"]
            parts.append((name, f"{record[key]:.1%} ({low:.1f}-{high:.1f})"))
    return parts


def _number(value: float | None, form: str) -> str:
    """Format a number; None becomes a dash."""
    return "-" if value is None else format(value, form)
