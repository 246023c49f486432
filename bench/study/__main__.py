"""`python -m bench.study`: every run, then tables, plots and a page."""

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
from bench.study.trial import Result
from kdrl_train.cli import exit_code, parse
from kdrl_train.config_file import differences, load_yaml, save_yaml, to_dict

MAY_GROW = (
    "out", "tasks", "arms", "main_arms", "quality_arms", "seeds", "main_seeds",
    "learning_rates", "betas", "more_betas", "widen", "workers",
)  # fmt: skip
"""Settings that a study may be gone on with: they say which runs there are, not what one is."""

OPTIONS = (
    "config", "out", "quick", "tasks", "seeds", "steps", "learning_rates", "betas", "workers",
    "device",
)  # fmt: skip
"""Settings that --help explains."""


def main(config: StudyConfig, console: Console | None = None) -> Path:
    """Make the study, or what is left of it; returns its folder.

    results.json, README.md with the tables, plots (.svg) and report.html are written once the arms
    of a task have run, and again after every later part.

    SIGTERM ends it as Ctrl-C does: with all of its processes. A run that crashes is a result like
    any other, and is not repeated until its result.json is deleted.

    Raises: ValueError for a folder with a study of other settings; ChildProcessError where a model
        cannot be trained.
    """
    config = quick(config) if config.quick else config
    console = console or Console(highlight=False)
    open_folder(config)
    found: dict[Trial, Result] = {}
    with ended_by_sigterm(), Runner(config, console) as runner:
        runner.models()
        for task in config.tasks:
            found |= choose_settings(config, runner, task)
            best = sweep.chosen(config, task, found)
            more = sweep.more_betas(config, task, best)
            found |= runner.trials(more, f"{task}: more betas, to compare")
            found |= runner.trials(sweep.final_trials(config, task, best), f"{task}: arms")
            write_up.write(config, results.save(config, found))
            if task == config.tasks[0]:
                quality = sweep.quality_trials(config, best)
                found |= runner.trials(quality, f"{task}: teachers of another quality")
                write_up.write(config, results.save(config, found))
    console.print((config.out / "README.md").read_text(encoding="utf-8"), markup=False)
    console.print(f"page: {config.out / 'report.html'}")
    return config.out


def choose_settings(config: StudyConfig, runner: Runner, task: str) -> dict[Trial, Result]:
    """What the arms' settings on a task are chosen by: learning rates, then betas."""
    found = runner.trials(sweep.rate_sweep(config, task), f"{task}: learning rates")
    settle(config, runner, task, found, "learning_rate")
    found |= runner.trials(sweep.beta_sweep(config, task, found), f"{task}: betas")
    settle(config, runner, task, found, "beta")
    return found


def settle(
    config: StudyConfig,
    runner: Runner,
    task: str,
    found: dict[Trial, Result],
    key: Literal["learning_rate", "beta"],
) -> None:
    """Add to a sweep what decides between settings that are close, and what lies past an end."""
    for left in range(config.widen if task == config.tasks[0] else 0, -1, -1):
        while again := sweep.runoff(config, task, found):
            found |= runner.trials(again, f"{task}: those close to the best, again")
        beyond = sweep.past_the_end(config, task, found, key) if left else []
        found |= runner.trials(beyond, f"{task}: past the end of a sweep")


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM raises SystemExit in the main thread, where Python would end at once and
    leave what it started running."""

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
    """Write study.yaml into a new folder, or compare with the one that is there.

    Raises: ValueError for another study's folder.
    """
    path = config.out / "study.yaml"
    if path.exists():
        first = load_yaml(path)["tasks"][0]
        if config.tasks[0] != first:
            raise ValueError(
                f"tasks must begin with {first}, on which the study in {config.out} has all of its "
                f"arms, got {', '.join(config.tasks)}"
            )
        old, new = ({k: v for k, v in values.items() if k not in MAY_GROW}
                    for values in (load_yaml(path), to_dict(config)))  # fmt: skip
        changed = differences(old, new)
        if changed:
            what = ", ".join(f"{key} {a} -> {b}" for key, (a, b) in changed.items())
            raise ValueError(
                f"out must be a new folder or hold a study of the same settings, got {config.out} "
                f"with {what}: choose another --out"
            )
    elif config.out.exists() and any(config.out.iterdir()):
        raise ValueError(
            f"out must be a new folder or a study's, got {config.out}, which holds other files"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    save_yaml(config, path)


def run(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    description = "train every arm of the study, then write its tables, plots and page"
    main(parse(StudyConfig(), argv, "python -m bench.study", description, OPTIONS))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(sys.argv[1:]), Console(stderr=True, highlight=False)))
