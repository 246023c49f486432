"""`python -m kdrl_train study`: every run, then tables, plots and a page."""

from pathlib import Path

from rich.console import Console

from kdrl_train.config_file import differences, load_yaml, save_yaml, to_dict
from kdrl_train.study import plan, results, write_up
from kdrl_train.study.config import StudyConfig, Trial, quick
from kdrl_train.study.runner import Runner
from kdrl_train.study.trial import Result

MAY_GROW = (
    "out", "tasks", "arms", "main_arms", "quality_arms", "seeds", "learning_rates", "betas",
    "more_betas", "workers",
)  # fmt: skip
"""Settings that a study may be gone on with: they say which runs there are, not what one is."""


def main(config: StudyConfig, console: Console | None = None) -> Path:
    """Make the study, or what is left of it; returns its folder.

    results.json, README.md with the tables, plots (.svg) and report.html are written again after
    each part, from the runs that have ended.

    Raises: ValueError for a folder with a study of other settings; ChildProcessError where a model
        cannot be trained. A run that crashes is a result like any other.
    """
    config = quick(config) if config.quick else config
    console = console or Console(highlight=False)
    open_folder(config)
    found: dict[Trial, Result] = {}
    with Runner(config, console) as runner:
        runner.models()
        best = {}
        for task in config.tasks:
            found |= runner.trials(plan.rate_sweep(config, task), f"{task}: learning rates")
            found |= runner.trials(plan.beta_sweep(config, task, found), f"{task}: betas")
            best[task] = plan.chosen(config, task, found)
            found |= runner.trials(plan.final_trials(config, task, best[task]), f"{task}: arms")
            write_up.write(config, results.save(config, found))
        quality = plan.quality_trials(config, best[config.tasks[0]])
        found |= runner.trials(quality, "teachers of another quality")
    write_up.write(config, results.save(config, found))
    console.print((config.out / "README.md").read_text(encoding="utf-8"), markup=False)
    console.print(f"page: {config.out / 'report.html'}")
    return config.out


def open_folder(config: StudyConfig) -> None:
    """Write study.yaml into a new folder, or compare with the one that is there.

    Raises: ValueError for another study's folder.
    """
    path = config.out / "study.yaml"
    if path.exists():
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
