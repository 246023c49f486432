"""Which runs a study makes: sweeps first, then what they chose, over seeds."""

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Literal, NamedTuple

from bench.study.arms import ARMS, NOT_TRAINED, SCHEDULES
from bench.study.config import RUNOFF_SEED, SWEEP_SEED, StudyConfig, Trial
from bench.study.trial import Result

CLOSE = 0.02
"""Settings whose one run is less right than the best by no more than this share run again."""

Found = Mapping[Trial, Result]
"""The runs of a sweep that have ended."""


class Settings(NamedTuple):
    """What is chosen for an arm."""

    learning_rate: float | None
    """None: nothing is trained."""
    beta: float | None
    """None: the arm has none to choose."""

    def run(self, task: str, arm: str, seed: int) -> Trial:
        """A run of a sweep at these settings."""
        return Trial(task=task, arm=arm, seed=seed, sweep=True, **self._asdict())


def has_beta(arm: str) -> bool:
    """Whether the study sets beta."""
    return ARMS[arm].tuned


def swept(config: StudyConfig, task: str) -> Iterator[str]:
    """Arms with a sweep of their own: those that are trained and take no other's settings."""
    for arm in config.arms_of(task):
        settings = len(config.learning_rates) * (len(config.betas) if has_beta(arm) else 1)
        if arm not in NOT_TRAINED and ARMS[arm].like is None and settings > 1:
            yield arm


def middle(config: StudyConfig, arm: str) -> Settings:
    """Where a sweep starts; without one, the only settings."""
    rates, betas = sorted(config.learning_rates), sorted(config.betas)
    return Settings(rates[len(rates) // 2], betas[len(betas) // 2] if has_beta(arm) else None)


def rate_sweep(config: StudyConfig, task: str) -> list[Trial]:
    """Every learning rate, at the middle beta."""
    return [
        middle(config, arm)._replace(learning_rate=rate).run(task, arm, SWEEP_SEED)
        for arm in swept(config, task)
        for rate in config.learning_rates
    ]


def beta_sweep(config: StudyConfig, task: str, found: Found) -> list[Trial]:
    """Every beta, at the best learning rate of the sweep before."""
    return [
        best(task, arm, found)._replace(beta=beta).run(task, arm, SWEEP_SEED)
        for arm in swept(config, task)
        if has_beta(arm)
        for beta in config.betas
    ]


def runoff(config: StudyConfig, task: str, found: Found) -> list[Trial]:
    """A second run, with another seed, of the best settings of each arm and of those close to them
    that have had one. Nothing for an arm with no settings close, or where none learnt anything."""
    trials = []
    for arm in swept(config, task):
        runs, winner = accuracies(task, arm, found), best(task, arm, found)
        least = fmean(runs[winner]) - CLOSE
        once = [one for one, values in runs.items() if len(values) == 1 and values[0] >= least]
        if set(once) - {winner} and fmean(runs[winner]) > 0:
            trials += [one.run(task, arm, RUNOFF_SEED) for one in once]
    return trials


def past_the_end(
    config: StudyConfig, task: str, found: Found, key: Literal["learning_rate", "beta"]
) -> list[Trial]:
    """One more value of `key` for each arm whose best one is the least or the greatest it has
    tried: it might be better still beyond. As far from the end as the next one is, as a ratio."""
    trials = []
    for arm in swept(config, task):
        runs, winner = accuracies(task, arm, found), best(task, arm, found)
        tried = sorted({getattr(one, key) for one in runs} - {None})
        value = getattr(winner, key)
        if len(tried) > 1 and value in (tried[0], tried[-1]) and fmean(runs[winner]) > 0:
            inner = tried[1] if value == tried[0] else tried[-2]
            beyond = winner._replace(**{key: float(f"{value * value / inner:.3g}")})
            trials.append(beyond.run(task, arm, SWEEP_SEED))
    return trials


def accuracies(task: str, arm: str, found: Found) -> dict[Settings, list[float]]:
    """Settings of an arm -> avg@k of each of their runs on the validation problems; 0: crashed."""
    runs: dict[Settings, list[float]] = {}
    for trial, result in found.items():
        if (trial.task, trial.arm) == (task, arm):
            score = result.scores.get("validation")
            right = 0.0 if score is None else float(score.shares.mean())
            runs.setdefault(Settings(trial.learning_rate, trial.beta), []).append(right)
    return runs


def best(task: str, arm: str, found: Found) -> Settings:
    """The best mean of those that have run most often: one lucky run is not enough where others
    have had two."""
    runs = accuracies(task, arm, found)
    return max(runs, key=lambda one: (len(runs[one]), fmean(runs[one])))


def chosen(config: StudyConfig, task: str, found: Found) -> dict[str, Settings]:
    """Arm -> its settings: what its sweep found best, or the arm's whose settings it takes; without
    a sweep the middle ones."""
    with_sweep = set(swept(config, task))

    def choose(arm: str) -> Settings:
        if arm in NOT_TRAINED:
            return Settings(None, None)
        source = ARMS[arm].like or arm
        return best(task, source, found) if source in with_sweep else middle(config, source)

    return {arm: choose(arm) for arm in config.arms_of(task)}


def more_betas(config: StudyConfig, task: str, best: Mapping[str, Settings]) -> list[Trial]:
    """Further values of beta, on the first task, for the arms whose sensitivity to it is compared.
    Settings are not chosen by them: the other arms have not tried them."""
    return [
        best[arm]._replace(beta=beta).run(task, arm, SWEEP_SEED)
        for arm in SCHEDULES
        if arm in best and task == config.tasks[0]
        for beta in config.more_betas
    ]


def final_trials(config: StudyConfig, task: str, best: Mapping[str, Settings]) -> list[Trial]:
    """Every arm at its settings, over the seeds."""
    return [
        Trial(task=task, arm=arm, seed=seed, **settings._asdict())
        for arm, settings in best.items()
        for seed in config.seeds_of(task, arm)
    ]


def quality_trials(config: StudyConfig, best: Mapping[str, Settings]) -> list[Trial]:
    """The teachers of another quality, and what learns from them, on the first task, at the
    settings chosen with the middle one."""
    learnt = [arm for arm in config.quality_arms if arm in best]
    arms = {"teacher": Settings(None, None)} | {arm: best[arm] for arm in learnt}
    return [
        Trial(task=config.tasks[0], arm=arm, seed=seed, teacher=teacher, **settings._asdict())
        for seed in range(config.seeds if learnt else 0)
        for teacher in ("weak", "strong")
        for arm, settings in arms.items()
    ]
