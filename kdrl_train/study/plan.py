"""Which runs a study makes: sweeps first, then what they chose, over seeds."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

from kdrl_train.study.analysis import MARGIN
from kdrl_train.study.arms import ARMS, NOT_TRAINED
from kdrl_train.study.config import RUNOFF_SEED, SWEEP_SEED, StudyConfig, Trial
from kdrl_train.study.trial import Result

Settings = tuple[float | None, float | None]
"""Learning rate and beta."""


def has_beta(arm: str) -> bool:
    """Whether the study sets beta."""
    return ARMS[arm].tuned


def swept(config: StudyConfig, task: str) -> list[str]:
    """Arms with a sweep of their own: those that are trained and take no other's settings."""
    arms = [arm for arm in config.arms_of(task) if arm not in NOT_TRAINED]
    return [arm for arm in arms if ARMS[arm].like is None and settings(config, task, arm) > 1]


def settings(config: StudyConfig, task: str, arm: str) -> int:
    """How many settings an arm's sweep tries."""
    return len(config.learning_rates) * (len(config.betas_of(task, arm)) if has_beta(arm) else 1)


def rate_sweep(config: StudyConfig, task: str) -> list[Trial]:
    """Every learning rate, at the middle beta."""
    trials = []
    for arm in swept(config, task):
        betas = config.betas_of(task, arm)
        beta = betas[len(betas) // 2] if has_beta(arm) else None
        trials += [
            Trial(task=task, arm=arm, learning_rate=rate, beta=beta, seed=SWEEP_SEED, sweep=True)
            for rate in config.learning_rates
        ]
    return trials


def beta_sweep(config: StudyConfig, task: str, found: Mapping[Trial, Result]) -> list[Trial]:
    """Every beta, at the best learning rate of the sweep before."""
    trials = []
    for arm in swept(config, task):
        if has_beta(arm):
            best = _best(task, arm, found)
            trials += [replace(best, beta=beta) for beta in config.betas_of(task, arm)]
    return trials


def past_the_end(
    config: StudyConfig,
    task: str,
    found: Mapping[Trial, Result],
    key: Literal["learning_rate", "beta"],
) -> list[Trial]:
    """One more value of `key` for each arm whose best one is the least or the greatest it has
    tried: it might be better still beyond. As far from the end as the next one is, as a ratio."""
    trials = []
    for arm in swept(config, task):
        tried = sorted({getattr(t, key) for t in _of(task, arm, found)} - {None})
        best = _best(task, arm, found)
        if len(tried) > 1 and getattr(best, key) in (tried[0], tried[-1]):
            end, inner = tried[:2] if getattr(best, key) == tried[0] else tried[:-3:-1]
            value = float(f"{end * end / inner:.3g}")
            rate = key == "learning_rate"
            trials.append(replace(best, learning_rate=value) if rate else replace(best, beta=value))
    return trials


def runoff(config: StudyConfig, task: str, found: Mapping[Trial, Result]) -> list[Trial]:
    """The settings of each arm that one run cannot tell from the best, with a second seed."""
    trials = []
    for arm in swept(config, task):
        close = _close(task, arm, found)
        if len(close) > 1:
            trials += [replace(trial, seed=RUNOFF_SEED) for trial in close]
    return trials


def _close(task: str, arm: str, found: Mapping[Trial, Result]) -> list[Trial]:
    """An arm's best run of the first seed of its sweep, and those within MARGIN of it."""
    first = [t for t in found if (t.task, t.arm, t.seed) == (task, arm, SWEEP_SEED)]
    least = max(rank(found[t]) for t in first) - MARGIN
    return [t for t in first if rank(found[t]) >= least]


def _of(task: str, arm: str, found: Iterable[Trial]) -> list[Trial]:
    return [t for t in found if (t.task, t.arm) == (task, arm)]


def _best(task: str, arm: str, found: Mapping[Trial, Result]) -> Trial:
    """Of those that are close: the best in the mean of its runs."""

    def mean(trial: Trial) -> float:
        second = found.get(replace(trial, seed=RUNOFF_SEED))
        return rank(found[trial]) if second is None else (rank(found[trial]) + rank(second)) / 2

    return max(_close(task, arm, found), key=mean)


def rank(result: Result) -> float:
    """avg@k on the validation problems; a crashed run is the worst."""
    if result.status == "crashed":
        return -1.0
    return float(result.scores["validation"].shares.mean())


def chosen(config: StudyConfig, task: str, found: Mapping[Trial, Result]) -> dict[str, Settings]:
    """Arm -> its best settings; without a sweep the only ones there are."""
    best: dict[str, Settings] = {}
    for arm in config.arms_of(task):
        if arm in NOT_TRAINED:
            best[arm] = (None, None)
            continue
        if _of(task, arm, found):
            winner = _best(task, arm, found)
            best[arm] = (winner.learning_rate, winner.beta)
        elif ARMS[arm].like is None:
            best[arm] = (config.learning_rates[0], config.betas[0] if has_beta(arm) else None)
    for arm in config.arms_of(task):
        like = ARMS[arm].like
        if like is not None:
            middle = (config.learning_rates[0], config.betas[0])
            best[arm] = best.get(like, middle)
    return best


def final_trials(config: StudyConfig, task: str, best: Mapping[str, Settings]) -> list[Trial]:
    """Every arm at its best settings, over the seeds; seed by seed, so that a study that is
    stopped has all arms of the first ones."""
    return [
        Trial(task=task, arm=arm, learning_rate=rate, beta=beta, seed=seed)
        for seed in range(config.seeds)
        for arm, (rate, beta) in best.items()
    ]


def quality_trials(config: StudyConfig, best: Mapping[str, Settings]) -> list[Trial]:
    """The teachers of another quality, and what learns from them, on the first task, at the
    settings chosen with the middle one."""
    if not config.quality_arms:
        return []
    arms = {"teacher": (None, None)} | {
        arm: best[arm] for arm in config.quality_arms if arm in best
    }
    return [
        Trial(
            task=config.tasks[0],
            arm=arm,
            learning_rate=rate,
            beta=beta,
            seed=seed,
            teacher=teacher,
        )
        for seed in range(config.seeds)
        for teacher in ("weak", "strong")
        for arm, (rate, beta) in arms.items()
    ]
