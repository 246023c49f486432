"""`python -m bench.study` makes every run of a study, then its tables, plots and page."""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal

from rich.console import Console

from bench.study import results, sweep, write_up
from bench.study.config import StudyConfig, Trial, quick
from bench.study.runner import Runner
from bench.study.trial import TrialResult
from kdrl_train.cli import exit_code, parse
from kdrl_train.config_file import differences, load_yaml, save_yaml, to_dict
from kdrl_train.output import guarded_console
from kdrl_train.runfolder.lock import FILE as LOCK
from kdrl_train.runfolder.lock import RunLock

MAY_GROW = (
    "out", "tasks", "arms", "main_arms", "quality_arms", "seeds", "main_seeds",
    "learning_rates", "betas", "more_betas", "widen", "workers",
)  # fmt: skip
"""Settings that may change when a study is continued: they select runs, and do not alter one."""

OPTIONS = (
    "config", "out", "quick", "tasks", "seeds", "steps", "learning_rates", "betas", "workers",
    "device",
)  # fmt: skip
"""Settings that --help explains."""


def main(config: StudyConfig, console: Console | None = None) -> Path:
    """Make the study, or the runs that a stopped study still lacks, and return its folder.

    results.json, README.md with the tables, plots (.svg) and report.html are written once the arms
    of a task have run, and again after every later part.

    SIGTERM ends the study and all of its processes, as Ctrl-C does. A run that crashes counts as
    a result, and is not repeated until its result.json is deleted.

    Raises: ValueError for a folder with a study of other settings, RunError where that study is at
        work; ChildProcessError where a model cannot be trained.
    """
    config = quick(config) if config.quick else config
    console = guarded_console(console)
    results_by_trial: dict[Trial, TrialResult] = {}
    with RunLock(config.out), ended_by_sigterm(), Runner(config, console) as runner:
        open_folder(config)
        runner.models()
        for task in config.tasks:
            results_by_trial |= choose_settings(config, runner, task)
            best = sweep.chosen(config, task, results_by_trial)
            more_betas = sweep.more_betas(config, task, best)
            results_by_trial |= runner.trials(more_betas, f"{task}: more values of beta")
            results_by_trial |= runner.trials(
                sweep.final_trials(config, task, best), f"{task}: arms"
            )
            write_up.write(config, results.save(config, results_by_trial))
            if task == config.tasks[0]:
                quality = sweep.quality_trials(config, best)
                results_by_trial |= runner.trials(quality, f"{task}: teachers of another quality")
                write_up.write(config, results.save(config, results_by_trial))
    console.print((config.out / "README.md").read_text(encoding="utf-8"), markup=False)
    console.print(f"page: {config.out / 'report.html'}", markup=False)
    return config.out


def choose_settings(config: StudyConfig, runner: Runner, task: str) -> dict[Trial, TrialResult]:
    """Run the sweeps that choose the arms' settings on a task: learning rates, then betas."""
    results_by_trial = runner.trials(sweep.rate_sweep(config, task), f"{task}: learning rates")
    settle(config, runner, task, results_by_trial, "learning_rate")
    results_by_trial |= runner.trials(
        sweep.beta_sweep(config, task, results_by_trial), f"{task}: betas"
    )
    settle(config, runner, task, results_by_trial, "beta")
    return results_by_trial


def settle(
    config: StudyConfig,
    runner: Runner,
    task: str,
    results_by_trial: dict[Trial, TrialResult],
    key: Literal["learning_rate", "beta"],
) -> None:
    """Run close settings again with another seed, and values past the end of a sweep."""
    for widenings_left in range(config.widen if task == config.tasks[0] else 0, -1, -1):
        while close := sweep.runoff(config, task, results_by_trial):
            results_by_trial |= runner.trials(close, f"{task}: settings close to the best, again")
        beyond = sweep.past_the_end(config, task, results_by_trial, key) if widenings_left else []
        results_by_trial |= runner.trials(beyond, f"{task}: past the end of a sweep")


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM raise SystemExit in the main thread, so that the processes started are ended.

    Without it Python would end at once and leave them running.
    """

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if main_thread else None
    try:
        yield
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def open_folder(config: StudyConfig) -> None:
    """Write study.yaml into a new folder, or compare the settings with an existing study.yaml.

    Raises: ValueError for the folder of another study, or with other files.
    """
    path = config.out / "study.yaml"
    if path.exists():
        first = load_yaml(path)["tasks"][0]
        if config.tasks[0] != first:
            raise ValueError(
                f"tasks must begin with {first}, since the study in {config.out} ran all of its "
                f"arms on that task, got {', '.join(config.tasks)}"
            )
        old, new = ({k: v for k, v in values.items() if k not in MAY_GROW}
                    for values in (load_yaml(path), to_dict(config)))  # fmt: skip
        changed = differences(old, new)
        if changed:
            what = ", ".join(f"{key} {a} -> {b}" for key, (a, b) in changed.items())
            raise ValueError(
                f"out must be a new folder or hold a study of the same settings, got {config.out} "
                f"where these differ: {what}; choose another --out"
            )
    elif config.out.exists() and any(path.name != LOCK for path in config.out.iterdir()):
        raise ValueError(
            f"out must be a new folder or hold a study, got {config.out}, which holds other files"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    save_yaml(config, path)


def run(argv: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    description = "train every arm of the study, then write its tables, plots and page"
    main(parse(StudyConfig(), argv, "python -m bench.study", description, OPTIONS))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(sys.argv[1:]), guarded_console(stderr=True)))
