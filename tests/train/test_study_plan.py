"""Which runs a study makes, and what its sweeps choose."""

from dataclasses import replace
from pathlib import Path

import pytest

from kdrl_train.study import plan, tables
from kdrl_train.study.analysis import Study
from kdrl_train.study.arms import SCHEDULES
from kdrl_train.study.config import RUNOFF_SEED, SWEEP_SEED, StudyConfig, Trial, quick
from kdrl_train.study.runner import grouped
from kdrl_train.study.trial import Result
from tests.train.study_results import result


def test_the_sweep_chooses_and_crashes_lose(tmp_path: Path) -> None:
    config = StudyConfig(out=tmp_path, arms=("student", "grpo", "kdrl", "k1_as_loss"), seeds=2)
    rates = plan.rate_sweep(config, "arithmetic")
    assert {t.arm for t in rates} == {"grpo", "kdrl"}
    assert {t.beta for t in rates if t.arm == "kdrl"} == {0.2}
    found = {
        t: result(t.arm, "1111" if t.learning_rate == 5e-4 else "0001",
                  seed=t.seed, learning_rate=t.learning_rate, beta=t.beta, sweep=True)
        for t in rates
    }  # fmt: skip
    betas = plan.beta_sweep(config, "arithmetic", found)
    assert {t.learning_rate for t in betas} == {5e-4}
    assert sorted({t.beta for t in betas}) == [0.02, 0.063, 0.2, 0.63, 2.0]
    for t in betas:
        crashed = replace(found[rates[0]], trial=t, status="crashed", scores={})
        found.setdefault(t, crashed)
    best = plan.chosen(config, "arithmetic", found)
    assert best["kdrl"] == best["k1_as_loss"] == (5e-4, 0.2)
    assert best["grpo"] == (5e-4, None)
    finals = plan.final_trials(config, "arithmetic", best)
    assert len(finals) == 8
    assert [t.seed for t in finals] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("key", "right", "beyond"),
    [
        ("learning_rate", ("0", "1", "2"), [2e-3]),
        ("learning_rate", ("2", "1", "0"), [1.25e-4]),
        ("learning_rate", ("1", "2", "1"), []),
        ("beta", ("1", "1", "2"), [20.0]),
        ("beta", ("2", "1", "1"), [0.002]),
    ],
)
def test_a_sweep_goes_on_past_an_end_that_is_best(
    key: str, right: tuple[str, ...], beyond: list[float]
) -> None:
    config = StudyConfig(arms=("grpo", "kdrl_k3"))
    values = getattr(config, f"{key}s")
    other = {"beta": 0.2} if key == "learning_rate" else {"learning_rate": 5e-4}
    runs = [
        result("kdrl_k3", digit, seed=1000, sweep=True, **{key: value}, **other)
        for digit, value in zip(right, values, strict=True)
    ]
    runs += [
        result("grpo", digit, seed=1000, sweep=True, learning_rate=rate)
        for digit, rate in zip("121", config.learning_rates, strict=True)
    ]
    found = {one.trial: one for one in runs}
    trials = plan.past_the_end(config, "arithmetic", found, key)  # type: ignore[arg-type]
    assert [(t.arm, getattr(t, key)) for t in trials] == [("kdrl_k3", value) for value in beyond]


def test_settings_that_one_run_cannot_tell_apart_run_again() -> None:
    config = StudyConfig(arms=("grpo", "kd_rkl"))

    def run(arm: str, rate: float, percent: int, seed: int = SWEEP_SEED) -> Result:
        right = ("4" * (percent // 4) + str(percent % 4)).ljust(26, "0")[:25]
        return result(arm, right, seed=seed, learning_rate=rate, sweep=True)

    clear = [run("kd_rkl", rate, score) for rate, score in ((2.5e-4, 40), (5e-4, 47), (1e-3, 44))]
    close = [run("grpo", rate, score) for rate, score in ((2.5e-4, 50), (5e-4, 51), (1e-3, 48))]
    found = {one.trial: one for one in clear + close}
    again = plan.runoff(config, "arithmetic", found)
    assert [(t.arm, t.learning_rate, t.seed) for t in again] == [
        ("grpo", 2.5e-4, RUNOFF_SEED), ("grpo", 5e-4, RUNOFF_SEED)
    ]  # fmt: skip
    assert plan.chosen(config, "arithmetic", found)["grpo"] == (5e-4, None)
    seconds = [run("grpo", 2.5e-4, 46, RUNOFF_SEED), run("grpo", 5e-4, 44, RUNOFF_SEED)]
    found |= {one.trial: one for one in seconds}
    assert plan.chosen(config, "arithmetic", found)["grpo"] == (2.5e-4, None)
    assert plan.runoff(config, "arithmetic", found) == again
    table = tables.sweeps(Study(found.values()), "arithmetic")
    assert [row[4][:4] for row in table.rows] == ["-", "-", "-", "46.0", "44.0", "-"]


def test_the_quick_study_sweeps_nothing() -> None:
    config = quick(StudyConfig())
    assert plan.swept(config, "arithmetic") == []
    best = plan.chosen(config, "arithmetic", {})
    assert set(best) == set(config.arms)
    assert plan.quality_trials(config, best) == []
    assert len(plan.final_trials(config, "arithmetic", best)) == 7


def test_schedules_share_the_betas_that_are_compared() -> None:
    config = StudyConfig()
    shared = {config.betas_of("arithmetic", arm) for arm in SCHEDULES}
    assert shared == {(0.02, 0.063, 0.2, 0.63, 2.0)}
    assert config.betas_of("arithmetic", "kdrl_k3") == (0.02, 0.2, 2.0)
    assert config.betas_of("countdown", "kdrl") == (0.02, 0.2, 2.0)


def test_no_worker_waits_long_for_another() -> None:
    trials = [
        Trial(task="arithmetic", arm=arm, seed=seed)
        for arm in ("grpo", "kdrl")
        for seed in range(5)
    ]
    groups = grouped(trials, workers=1)
    assert [len(group) for group in groups] == [3, 3, 2, 2]
    assert all(len({trial.arm for trial in group}) == 1 for group in groups)
    assert sorted((t.arm, t.seed) for group in groups for t in group) == [
        (t.arm, t.seed) for t in trials
    ]
    assert grouped([], workers=2) == []
