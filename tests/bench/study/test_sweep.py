"""Tests which runs a study makes, and what its sweeps choose."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from bench.study import __main__ as command
from bench.study import sweep, tables
from bench.study.analysis import Study
from bench.study.arms import ARMS, SCHEDULES
from bench.study.config import RUNOFF_SEED, SWEEP_SEED, StudyConfig, Trial, quick
from bench.study.runner import Runner, grouped
from bench.study.sweep import Settings
from bench.study.trial import TrialResult
from tests.bench.study.study_results import result

TASK = "arithmetic"
Percent = Callable[[Trial], int | None]


class ScriptedRunner(Runner):
    """A runner whose runs end at once with a scripted accuracy in percent; None: crashed."""

    def __init__(self, config: StudyConfig, percent: Percent) -> None:
        super().__init__(config, Console(quiet=True))
        self.percent = percent
        self.results_by_trial: dict[Trial, TrialResult] = {}

    def trials(self, trials: Iterable[Trial], what: str) -> dict[Trial, TrialResult]:  # noqa: ARG002
        distinct = list(trials)
        self.results_by_trial |= {trial: self._run(trial) for trial in distinct}
        return {trial: self.results_by_trial[trial] for trial in distinct}

    def _run(self, trial: Trial) -> TrialResult:
        percent = self.percent(trial)
        problems = f"{'4' * ((percent or 0) // 4)}{(percent or 0) % 4}".ljust(26, "0")[:25]
        trial_result = replace(result(trial.arm, problems, sweep=True), trial=trial)
        return (
            trial_result
            if percent is not None
            else replace(trial_result, status="crashed", scores={})
        )

    def tried(self, arm: str) -> set[tuple[Any, ...]]:
        return {(t.learning_rate, t.beta, t.seed) for t in self.results_by_trial if t.arm == arm}


def run_sweep(
    percent: Percent, *arms: str, task: str = TASK, **fields: Any
) -> tuple[dict[str, Settings], ScriptedRunner]:
    """Return the settings that a sweep chooses, and the runner with everything that ran."""
    config = StudyConfig(arms=arms, **fields)
    with ScriptedRunner(config, percent) as runner:
        results_by_trial = command.choose_settings(config, runner, task)
    assert results_by_trial == runner.results_by_trial
    return sweep.chosen(config, task, results_by_trial), runner


def test_learning_rates_at_the_middle_beta_then_betas_at_the_best_rate() -> None:
    def percent(trial: Trial) -> int:
        return 10 + 20 * (trial.learning_rate == 5e-4) + 20 * (trial.beta == 0.2)

    best, runner = run_sweep(percent, "student", "grpo", "kdrl", "k1_as_loss", "kdrl_sketch")
    rates, betas = (2.5e-4, 5e-4, 1e-3), (0.02, 0.2, 2.0)
    assert runner.tried("grpo") == {(rate, None, SWEEP_SEED) for rate in rates}
    at_the_middle = {(rate, 0.2, SWEEP_SEED) for rate in rates}
    assert runner.tried("kdrl") == at_the_middle | {(5e-4, beta, SWEEP_SEED) for beta in betas}
    assert {trial.arm for trial in runner.results_by_trial} == {"grpo", "kdrl"}
    assert best["kdrl"] == best["k1_as_loss"] == best["kdrl_sketch"] == (5e-4, 0.2)
    assert best["grpo"] == (5e-4, None)
    assert best["student"] == (None, None)
    finals = sweep.final_trials(StudyConfig(seeds=2, main_seeds=3), TASK, best)
    assert [t.seed for t in finals if t.arm == "k1_as_loss"] == [0, 1]
    assert [t.seed for t in finals if t.arm == "kdrl"] == [0, 1, 2]
    elsewhere = sweep.final_trials(StudyConfig(seeds=2, main_seeds=3), "countdown", best)
    assert [t.seed for t in elsewhere if t.arm == "kdrl"] == [0, 1]


def test_an_arm_with_learning_rates_of_its_own_is_swept_over_them() -> None:
    rates = ARMS["grpo_lora"].learning_rates
    best, runner = run_sweep(
        lambda t: 40 + 20 * (t.learning_rate == rates[1]),
        "grpo", "kdrl", "grpo_lora", "kdrl_lora", learning_rates=(5e-4,), betas=(0.2,),
    )  # fmt: skip
    assert runner.tried("grpo_lora") == {(rate, None, SWEEP_SEED) for rate in rates}
    assert runner.tried("kdrl_lora") == {(rate, 0.2, SWEEP_SEED) for rate in rates}
    assert {trial.arm for trial in runner.results_by_trial} == {"grpo_lora", "kdrl_lora"}
    assert best["grpo_lora"].learning_rate == best["kdrl_lora"].learning_rate == rates[1]
    assert best["kdrl"].learning_rate == 5e-4


@pytest.mark.parametrize(
    ("widen", "chosen", "tried"),
    [
        (0, 1e-3, {2.5e-4, 5e-4, 1e-3}),
        (1, 2e-3, {2.5e-4, 5e-4, 1e-3, 2e-3}),
        (3, 4e-3, {2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3}),
    ],
)
def test_a_sweep_goes_on_past_an_end_that_is_best(
    widen: int, chosen: float, tried: set[float]
) -> None:
    best, runner = run_sweep(
        lambda t: 10 if t.learning_rate == 8e-3 else int(10_000 * (t.learning_rate or 0)),
        "grpo", widen=widen,
    )  # fmt: skip
    assert best["grpo"].learning_rate == chosen
    assert {rate for rate, _, _ in runner.tried("grpo")} == tried


def test_other_tasks_are_swept_over_the_configured_values_alone() -> None:
    best, runner = run_sweep(
        lambda t: int(10_000 * (t.learning_rate or 0)), "grpo", task="countdown"
    )
    assert best["grpo"].learning_rate == 1e-3
    assert len(runner.results_by_trial) == 3


def test_betas_go_on_below_too_and_in_their_own_ratio() -> None:
    best, _ = run_sweep(
        lambda t: 50 if t.beta == 0.002 else 40 - int(10 * (t.beta or 0)), "kdrl_k3"
    )
    assert best["kdrl_k3"].beta == 0.002


def test_an_end_that_only_a_second_run_shows_is_passed_too() -> None:
    first_run = {2.5e-4: 40, 5e-4: 50, 1e-3: 49, 2e-3: 60}
    second_run = {5e-4: 40, 1e-3: 49, 2e-3: 60}
    best, runner = run_sweep(
        lambda t: (first_run if t.seed == SWEEP_SEED else second_run)[t.learning_rate or 0],
        "grpo",
        widen=1,
    )
    assert (1e-3, None, RUNOFF_SEED) in runner.tried("grpo")
    assert (2e-3, None, SWEEP_SEED) in runner.tried("grpo")
    assert best["grpo"] == (2e-3, None)


def test_one_lucky_run_does_not_choose() -> None:
    """Second runs show which rate is better, and a beta with a bad second run is not chosen."""
    rate, other = 5e-4, 2.5e-4
    percents: dict[tuple[float | None, float | None], tuple[int, int]] = {
        (other, 0.2): (51, 44), (rate, 0.2): (50, 48), (1e-3, 0.2): (20, 20),
        (rate, 0.02): (52, 40), (rate, 2.0): (30, 30),
    }  # fmt: skip
    best, runner = run_sweep(
        lambda t: percents[t.learning_rate, t.beta][t.seed == RUNOFF_SEED], "kdrl_exact"
    )
    twice = {(r, b) for r, b, seed in runner.tried("kdrl_exact") if seed == RUNOFF_SEED}
    assert twice == {(other, 0.2), (rate, 0.2), (rate, 0.02)}
    assert best["kdrl_exact"] == (rate, 0.2)


@pytest.mark.parametrize("nothing", [0, None])
def test_an_arm_that_learns_nothing_is_not_swept_further(nothing: int | None) -> None:
    best, runner = run_sweep(lambda t: 30 if t.arm == "grpo" else nothing, "grpo", "kdrl")
    assert len(runner.tried("kdrl")) == 5
    assert best["kdrl"].learning_rate in StudyConfig().learning_rates


def test_a_crash_loses() -> None:
    best, _ = run_sweep(lambda t: None if t.learning_rate != 1e-3 else 1, "grpo", widen=0)
    assert best["grpo"] == (1e-3, None)


def test_second_runs_are_shown_apart() -> None:
    _, runner = run_sweep(lambda t: 50 - (t.seed == RUNOFF_SEED), "kdrl", widen=0)
    study = Study(runner.results_by_trial.values())
    rows = tables.sweeps(study, TASK).rows
    assert {(row[3][:4], row[4][:4]) for row in rows} == {("50.0", "49.0")}
    shown = tables.by_beta(study, TASK, "kdrl")
    assert {beta: accuracy and accuracy.mean for beta, accuracy in shown.items()} == {
        0.02: 0.5, 0.2: 0.5, 2.0: 0.5
    }  # fmt: skip


def test_the_quick_study_sweeps_nothing() -> None:
    config = quick(StudyConfig())
    assert list(sweep.swept(config, TASK)) == []
    best = sweep.chosen(config, TASK, {})
    assert set(best) == set(config.arms)
    assert sweep.quality_trials(config, best) == []
    assert len(sweep.final_trials(config, TASK, best)) == 7


def test_betas_that_are_only_compared_choose_nothing() -> None:
    config = StudyConfig(arms=("kdrl", "kdrl_k3", "kdrl_step"))
    best = dict.fromkeys(config.arms, Settings(1e-3, 2.0))
    trials = sweep.more_betas(config, TASK, best)
    assert {t.arm for t in trials} == {"kdrl", "kdrl_step"} <= set(SCHEDULES)
    assert {(t.learning_rate, t.beta, t.sweep) for t in trials} == {
        (1e-3, 0.063, True), (1e-3, 0.63, True)
    }  # fmt: skip
    assert sweep.more_betas(config, "countdown", best) == []
    assert all(t.beta in config.betas for t in sweep.rate_sweep(config, TASK))


def test_no_worker_waits_long_for_another() -> None:
    trials = [Trial(task=TASK, arm=arm, seed=seed) for arm in ("grpo", "kdrl") for seed in range(5)]
    groups = grouped(trials, workers=1)
    assert [len(group) for group in groups] == [3, 3, 2, 2]
    assert all(len({trial.arm for trial in group}) == 1 for group in groups)
    assert sorted((t.arm, t.seed) for group in groups for t in group) == [
        (t.arm, t.seed) for t in trials
    ]
    assert grouped([], workers=2) == []
