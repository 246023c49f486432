"""What a run leaves behind: metrics.jsonl, samples/, and one line per step on the console."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from kdrl_train.rollout import Rollouts
from kdrl_train.trackers import Trackers

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
        first_step: step the run starts at. Rows of this step and later, which a killed run wrote
            after its last checkpoint, are removed, and so is a torn last line.
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
        if not writes:
            return
        self.postponed_path = folder / "postponed.json"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        _write_rows(self.metrics_path, [r for r in read_rows(folder) if r["step"] < first_step])

    def step(self, row: dict[str, Any]) -> None:
        """Append one step's metrics and print its line. A number that is not finite becomes null
        in the file: JSON has no NaN."""
        if not self.writes:
            return
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(_json(row) + "\n")
        if self.trackers is not None:
            self.trackers.log(row)
        width = self.console.width if self.console.is_terminal else None
        self.console.print(_line(row, self.steps, width), soft_wrap=True)

    def postpone(self, row: dict[str, Any]) -> None:
        """Keep a step's row aside, outside of metrics.jsonl: its evaluation is still to come."""
        if self.writes:
            work = self.postponed_path.with_name(f".{self.postponed_path.name}.tmp")
            work.write_text(_json(row) + "\n", encoding="utf-8")
            os.replace(work, self.postponed_path)

    def postponed(self, step: int) -> dict[str, Any] | None:
        """The row kept aside, if it is of this step and metrics.jsonl lacks it."""
        if not self.postponed_path.exists():
            return None
        row = json.loads(self.postponed_path.read_text(encoding="utf-8"))
        logged = {other["step"] for other in read_rows(self.folder)}
        return row if row["step"] == step and step not in logged else None

    def say(self, message: str) -> None:
        """One line on the console, nothing in the files."""
        if self.writes:
            self.console.print(Text(message), soft_wrap=True)

    def samples(
        self, step: int, rollouts: Rollouts, prompts: list[str], answers: list[str],
        rewards_R: torch.Tensor, count: int,
    ) -> None:  # fmt: skip
        """Write `count` completions, spread over the step, to samples/step_XXXXXX.jsonl.

        prompts, answers: R texts, one per completion.
        """
        if not self.writes:
            return
        total = len(rollouts.texts)
        count = min(count, total)
        rows = [
            {
                "step": step,
                "prompt": prompts[r],
                "completion": rollouts.texts[r],
                "answer": answers[r],
                "reward": rewards_R[r].item(),
                "tokens": len(rollouts.completion_ids[r]),
                "truncated": bool(rollouts.truncated[r]),
            }
            for r in sorted({i * total // count for i in range(count)})
        ]
        path = self.folder / "samples" / f"step_{step:06d}.jsonl"
        path.write_text("".join(_json(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl in a run folder; a torn line (the process was killed) ends them."""
    path = folder / "metrics.jsonl"
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    work = path.with_name(f".{path.name}.tmp")
    work.write_text("".join(_json(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(work, path)


def _json(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row), ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
