"""Runs the trials of a study in processes of their own; a trial that ended is not run again."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import TypeVar

from rich.console import Console

from bench.study import setup
from bench.study.config import StudyConfig, Trial
from bench.study.statistics import mean_over_seeds
from bench.study.trial import TrialResult, trial_folder

Job = TypeVar("Job")
Done = TypeVar("Done")

TAIL_CHARS = 400
"""Characters of the log's end in the message of a run that was killed."""


class Runner(AbstractContextManager["Runner"]):
    """A runner keeps config.workers processes busy, each with one CPU thread.

    Use it as a context manager: when it is left, by an error or Ctrl-C, it kills the processes that
    still run, and the next study begins their trials anew.
    """

    def __init__(self, config: StudyConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self._pool = ThreadPoolExecutor(config.workers)
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()
        self._pool.shutdown(cancel_futures=True)

    def models(self) -> None:
        """Make every problem and model of the study that does not exist yet.

        Raises: ChildProcessError where a model cannot be trained.
        """
        for task in self.config.tasks:
            setup.write_task(self.config, task)
        pairs = [
            (task, name) for task in self.config.tasks for name in setup.models(self.config, task)
        ]
        folders = {pair: setup.folder(self.config, pair[0]) / pair[1] for pair in pairs}
        missing = [pair for pair, folder in folders.items() if not folder.exists()]
        done = self._each(missing, lambda one: self._process(["/".join(one)], self._tell))
        for (task, name), code in done:
            if code:
                raise ChildProcessError(
                    f"{task}/{name} must be trained, got exit code {code}: its message is above"
                )

    def trials(self, trials: Iterable[Trial], what: str) -> dict[Trial, TrialResult]:
        """Run the trials that have no result yet and return the results of all, in order.

        The result of a trial that crashes says so.
        """
        distinct = list(dict.fromkeys(trials))
        if not distinct:
            return {}
        to_do = [trial for trial in distinct if not self._path(trial).exists()]
        title = f"{what}: {len(distinct)} runs, {len(to_do)} of them to do"
        self.console.rule(title, align="left")
        for _ in self._each(grouped(to_do, self.config.workers), self._group):
            pass
        return {trial: TrialResult.read(self._path(trial)) for trial in distinct}

    def _group(self, trials: list[Trial]) -> None:
        """Run trials in one process; if a trial kills it, run those behind that one in another."""
        waiting = {trial.name: trial for trial in trials}

        def on_end(name: str) -> None:
            self._ended(waiting.pop(name))

        while waiting and not self._closed:
            for trial in waiting.values():
                folder = trial_folder(self.config, trial)
                rmtree(folder, ignore_errors=True)  # of a study that was stopped
                folder.mkdir(parents=True)
                text = json.dumps(asdict(trial)) + "\n"
                (folder / "trial.json").write_text(text, encoding="utf-8")
            code = self._process(list(waiting), on_end)
            if waiting and not self._closed:
                self._killed(waiting.pop(next(iter(waiting))), code)

    def _ended(self, trial: Trial) -> None:
        self.console.print(summary(TrialResult.read(self._path(trial))), markup=False)

    def _killed(self, trial: Trial, code: int) -> None:
        """Write the result of a trial whose process ended without one: it has crashed."""
        log = trial_folder(self.config, trial) / "log.txt"
        error = f"exit code {code}: {_tail(log)}"
        TrialResult(trial=trial, status="crashed", error=error).write(self._path(trial))
        self._ended(trial)

    def _process(self, names: Sequence[str], tell: Callable[[str], object]) -> int:
        """Run trials or models, by name, in a child process and return its exit code.

        `tell` is called with the name of each trial that has ended, and with what a model prints.
        """
        command = [sys.executable, "-m", "bench.study.trial", str(self.config.out), *names]
        with self._lock:
            if self._closed:
                return 1
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            self._running.add(process)
        assert process.stdout is not None
        with process:
            for line in process.stdout:
                tell(line.rstrip("\n"))
        with self._lock:
            self._running.discard(process)
        return process.returncode

    def _each(self, jobs: Sequence[Job], do: Callable[[Job], Done]) -> Iterable[tuple[Job, Done]]:
        """Yield each job with the result of do(job), in the order in which they end."""
        futures: dict[Future[Done], Job] = {self._pool.submit(do, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def _path(self, trial: Trial) -> Path:
        return trial_folder(self.config, trial) / "result.json"

    def _tell(self, line: str) -> None:
        self.console.print(line, markup=False)


def grouped(trials: Sequence[Trial], workers: int) -> list[list[Trial]]:
    """Divide trials into groups of one arm, each for one process, which takes seconds to start.

    Long groups come first, and none is so long that the other workers wait for it.
    """
    arms: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        arms.setdefault((trial.task, trial.arm, trial.teacher), []).append(trial)
    size = -(-len(trials) // (4 * workers))
    groups = [arm[i : i + size] for arm in arms.values() for i in range(0, len(arm), size)]
    return sorted(groups, key=len, reverse=True)


def _tail(log: Path) -> str:
    """Return the end of a trial's log; without a log the process wrote to the console."""
    if not log.exists():
        return "no log was begun: its message is above"
    return log.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARS:].strip()


def summary(result: TrialResult) -> str:
    """Describe a result in one line for the console."""
    if result.status == "crashed":
        return f"{result.trial.name}: CRASHED, {result.error}"
    parts = []
    for name, score in result.scores.items():
        share = mean_over_seeds(score.shares[None])
        parts.append(f"{name} {share.mean:.1%} ({100 * share.low:.1f}-{100 * share.high:.1f})")
    return f"{result.trial.name}: {', '.join(parts)} in {result.seconds:.0f} s"
