"""Runs of a study in processes of their own, some at a time; one that ended is not done again."""

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
from bench.study.statistics import estimate
from bench.study.trial import Result, trial_folder

Job = TypeVar("Job")
Done = TypeVar("Done")

TAIL_CHARS = 400
"""Of a log, in the message of a run that was killed."""


class Runner(AbstractContextManager["Runner"]):
    """config.workers processes, each of one CPU thread. Use it as a context manager: what still
    runs when it is left, by an error or Ctrl-C, is ended, and is begun anew by the next study."""

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
        """Every problem and model of the study. Raises: ChildProcessError where one fails."""
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
                    f"{task}/{name} must train, got exit code {code}: its message is above"
                )

    def trials(self, trials: Iterable[Trial], what: str) -> dict[Trial, Result]:
        """Results of all, in order; a trial that crashes has that as its result."""
        wanted = list(dict.fromkeys(trials))
        if not wanted:
            return {}
        left = [trial for trial in wanted if not self._path(trial).exists()]
        self.console.rule(f"{what}: {len(wanted)} runs, {len(left)} to do", align="left")
        for _ in self._each(grouped(left, self.config.workers), self._group):
            pass
        return {trial: Result.read(self._path(trial)) for trial in wanted}

    def _group(self, trials: list[Trial]) -> None:
        """Trials in one process; again from the next one where one of them ends it."""
        waiting = {trial.name: trial for trial in trials}

        def ended(name: str) -> None:
            self._ended(waiting.pop(name))

        while waiting and not self._closed:
            for trial in waiting.values():
                folder = trial_folder(self.config, trial)
                rmtree(folder, ignore_errors=True)  # of a study that was stopped
                folder.mkdir(parents=True)
                text = json.dumps(asdict(trial)) + "\n"
                (folder / "trial.json").write_text(text, encoding="utf-8")
            code = self._process(list(waiting), ended)
            if waiting and not self._closed:
                self._killed(waiting.pop(next(iter(waiting))), code)

    def _ended(self, trial: Trial) -> None:
        self.console.print(summary(Result.read(self._path(trial))), markup=False)

    def _killed(self, trial: Trial, code: int) -> None:
        """A process that ended by itself, and left no result, has crashed."""
        log = trial_folder(self.config, trial) / "log.txt"
        error = f"exit code {code}: {_tail(log)}"
        Result(trial=trial, status="crashed", error=error).write(self._path(trial))
        self._ended(trial)

    def _process(self, names: Sequence[str], told: Callable[[str], object]) -> int:
        """Exit code of a child that does what is named, and tells each that has ended."""
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
                told(line.rstrip("\n"))
        with self._lock:
            self._running.discard(process)
        return process.returncode

    def _each(self, jobs: Sequence[Job], do: Callable[[Job], Done]) -> Iterable[tuple[Job, Done]]:
        """Each job with what `do` made of it, as they end."""
        futures: dict[Future[Done], Job] = {self._pool.submit(do, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def _path(self, trial: Trial) -> Path:
        return trial_folder(self.config, trial) / "result.json"

    def _tell(self, line: str) -> None:
        self.console.print(line, markup=False)


def grouped(trials: Sequence[Trial], workers: int) -> list[list[Trial]]:
    """Trials of an arm that one process does, one after the other: to start it takes some seconds.
    The long ones first, and none so long that the other workers wait for it."""
    arms: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        arms.setdefault((trial.task, trial.arm, trial.teacher), []).append(trial)
    size = -(-len(trials) // (4 * workers))
    groups = [arm[i : i + size] for arm in arms.values() for i in range(0, len(arm), size)]
    return sorted(groups, key=len, reverse=True)


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARS:].strip()


def summary(result: Result) -> str:
    """One line for the console."""
    if result.status == "crashed":
        return f"{result.trial.name}: CRASHED, {result.error}"
    parts = []
    for name, score in result.scores.items():
        found = estimate(score.shares[None])
        parts.append(f"{name} {found.mean:.1%} ({100 * found.low:.1f}-{100 * found.high:.1f})")
    return f"{result.trial.name}: {', '.join(parts)} in {result.seconds:.0f} s"
