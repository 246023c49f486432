"""Decides which runs a study makes: sweeps first, then the settings they chose, over seeds."""

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Literal, NamedTuple

from bench.study.arms import ARMS, NOT_TRAINED, SCHEDULES
from bench.study.config import RUNOFF_SEED, SWEEP_SEED, StudyConfig, Trial
from bench.study.trial import TrialResult

CLOSE = 0.02
"""Settings run a second time if their first accuracy is at most this far below the best."""

Results = Mapping[Trial, TrialResult]
"""The runs of a sweep that have ended."""


class Settings(NamedTuple):
    """The learning rate and the beta that are chosen for an arm."""

    learning_rate: float | None
    """None: nothing is trained."""
    beta: float | None
    """None: the arm has none to choose."""

    def run(self, task: str, arm: str, seed: int) -> Trial:
        """Return a run of a sweep at these settings."""
        return Trial(task=task, arm=arm, seed=seed, sweep=True, **self._asdict())


def has_beta(arm: str) -> bool:
    """Say whether the study sets the arm's beta."""
    return ARMS[arm].tuned


def rates(config: StudyConfig, arm: str) -> tuple[float, ...]:
    """Return the learning rates of an arm's sweep."""
    return ARMS[arm].learning_rates or config.learning_rates


def swept(config: StudyConfig, task: str) -> Iterator[str]:
    """Yield the arms with a sweep: those that train and do not take another arm's settings."""
    for arm in config.arms_of(task):
        settings = len(rates(config, arm)) * (len(config.betas) if has_beta(arm) else 1)
        if arm not in NOT_TRAINED and ARMS[arm].like is None and settings > 1:
            yield arm


def middle(config: StudyConfig, arm: str) -> Settings:
    """Return the settings at which a sweep starts; an arm without a sweep runs at them."""
    by_size, betas = sorted(rates(config, arm)), sorted(config.betas)
    return Settings(by_size[len(by_size) // 2], betas[len(betas) // 2] if has_beta(arm) else None)


def rate_sweep(config: StudyConfig, task: str) -> list[Trial]:
    """List the runs of every learning rate, at the middle beta."""
    return [
        middle(config, arm)._replace(learning_rate=rate).run(task, arm, SWEEP_SEED)
        for arm in swept(config, task)
        for rate in rates(config, arm)
    ]


def beta_sweep(config: StudyConfig, task: str, results: Results) -> list[Trial]:
    """List the runs of every beta, at the best learning rate of the sweep before."""
    return [
        best(task, arm, results)._replace(beta=beta).run(task, arm, SWEEP_SEED)
        for arm in swept(config, task)
        if has_beta(arm)
        for beta in config.betas
    ]


def runoff(config: StudyConfig, task: str, results: Results) -> list[Trial]:
    """List second runs, with another seed, of each arm's best settings and of those close to them.

    Settings that had a second run are left out, and so are arms without close settings and arms
    that learnt nothing.
    """
    trials = []
    for arm in swept(config, task):
        runs, winner = accuracies(task, arm, results), best(task, arm, results)
        least = fmean(runs[winner]) - CLOSE
        once = [one for one, values in runs.items() if len(values) == 1 and values[0] >= least]
        if set(once) - {winner} and fmean(runs[winner]) > 0:
            trials += [one.run(task, arm, RUNOFF_SEED) for one in once]
    return trials


def past_the_end(
    config: StudyConfig, task: str, results: Results, key: Literal["learning_rate", "beta"]
) -> list[Trial]:
    """List a run of one more value of `key` for each arm whose best value is an end of its sweep.

    A better value may lie beyond. The ratio to the end is that of the end to its neighbour.
    """
    trials = []
    for arm in swept(config, task):
        runs, winner = accuracies(task, arm, results), best(task, arm, results)
        tried = sorted({getattr(one, key) for one in runs} - {None})
        value = getattr(winner, key)
        if len(tried) > 1 and value in (tried[0], tried[-1]) and fmean(runs[winner]) > 0:
            inner = tried[1] if value == tried[0] else tried[-2]
            beyond = winner._replace(**{key: float(f"{value * value / inner:.3g}")})
            trials.append(beyond.run(task, arm, SWEEP_SEED))
    return trials


def accuracies(task: str, arm: str, results: Results) -> dict[Settings, list[float]]:
    """Return avg@k on the validation problems of each run of an arm, by settings; 0: crashed."""
    runs: dict[Settings, list[float]] = {}
    for trial, result in results.items():
        if (trial.task, trial.arm) == (task, arm):
            score = result.scores.get("validation")
            right = 0.0 if score is None else float(score.shares.mean())
            runs.setdefault(Settings(trial.learning_rate, trial.beta), []).append(right)
    return runs


def best(task: str, arm: str, results: Results) -> Settings:
    """Choose the settings with the best mean among those with the most runs.

    One lucky run is not enough where other settings have had two.
    """
    runs = accuracies(task, arm, results)
    return max(runs, key=lambda one: (len(runs[one]), fmean(runs[one])))


def chosen(config: StudyConfig, task: str, results: Results) -> dict[str, Settings]:
    """Return the settings of each arm: the best of its sweep, or of that of the arm it is `like`.

    An arm without a sweep has the middle settings.
    """
    with_sweep = set(swept(config, task))

    def choose(arm: str) -> Settings:
        if arm in NOT_TRAINED:
            return Settings(None, None)
        source = ARMS[arm].like or arm
        return best(task, source, results) if source in with_sweep else middle(config, source)

    return {arm: choose(arm) for arm in config.arms_of(task)}


def more_betas(config: StudyConfig, task: str, best: Mapping[str, Settings]) -> list[Trial]:
    """List runs of further betas, on the first task, for the arms whose sensitivity is compared.

    They choose no settings, since the other arms have not tried these values.
    """
    return [
        best[arm]._replace(beta=beta).run(task, arm, SWEEP_SEED)
        for arm in SCHEDULES
        if arm in best and task == config.tasks[0]
        for beta in config.more_betas
    ]


def final_trials(config: StudyConfig, task: str, best: Mapping[str, Settings]) -> list[Trial]:
    """List the reported runs: every arm at its settings, over the seeds."""
    return [
        Trial(task=task, arm=arm, seed=seed, **settings._asdict())
        for arm, settings in best.items()
        for seed in config.seeds_of(task, arm)
    ]


def quality_trials(config: StudyConfig, best: Mapping[str, Settings]) -> list[Trial]:
    """List the runs of the weak and the strong teacher and of the arms that learn from them.

    They are on the first task, at the settings chosen with the middle teacher.
    """
    learnt = [arm for arm in config.quality_arms if arm in best]
    arms = {"teacher": Settings(None, None)} | {arm: best[arm] for arm in learnt}
    return [
        Trial(task=config.tasks[0], arm=arm, seed=seed, teacher=teacher, **settings._asdict())
        for seed in range(config.seeds if learnt else 0)
        for teacher in ("weak", "strong")
        for arm, settings in arms.items()
    ]
