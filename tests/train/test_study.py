"""The study: arms, intervals, which runs it makes, what it says of them; one small study, run."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import kdrl_kernels as kk
from kdrl_train import sft, train
from kdrl_train.presets import PRESETS
from kdrl_train.study import analysis, command, lab, plan, plots, results, tables, write_up
from kdrl_train.study.analysis import FINDINGS, Finding, Study
from kdrl_train.study.arms import ARMS, NOT_TRAINED, PAPER_STEPS, SCHEDULES
from kdrl_train.study.config import (
    RUNOFF_SEED,
    SWEEP_SEED,
    LabConfig,
    StudyConfig,
    Trial,
    quick,
)
from kdrl_train.study.control import k1_as_loss
from kdrl_train.study.runner import Runner, grouped, summary
from kdrl_train.study.statistics import Estimate
from kdrl_train.study.trial import Result, Score, finish, train_config, trial_folder

TEST = ("test", "longer", "larger")


def result(arm: str, right: str = "0123", *, seed: int = 0, **trial: Any) -> Result:
    """A run that ended, with the same digits on every set and a short curve."""
    made = Trial(task="arithmetic", arm=arm, seed=seed, **trial)
    sets = ("validation",) if made.sweep else TEST
    score = Score(
        samples=4, right=right, pass_at_k=0.5, maj_at_k=None, length=10.0 + seed, truncated=0.0
    )
    curve: dict[str, list[float | None]] = {}
    if arm not in NOT_TRAINED:
        curve = {name: [0.1 * i for i in range(20)] for name in ("accuracy", "seconds_rollout")}
        curve["response_length"] = [20.0] * 20
        curve["tokens"] = [100.0] * 20
    return Result(
        trial=made, status="done", scores=dict.fromkeys(sets, score), curve=curve, seconds=1.0
    )


def test_an_arm_is_its_preset_at_beta_and_stretched() -> None:
    annealed = ARMS["kdrl_annealed"].at(0.5, PAPER_STEPS)
    preset = PRESETS["kdrl_annealed"]
    assert replace(annealed, kd_coef=preset.kd_coef) == preset
    assert (annealed.kd_coef.initial, annealed.kd_coef.final) == (0.5, 0.1)
    assert annealed.kd_coef.steps == 80
    half = ARMS["opd_then_rl"].at(None, PAPER_STEPS // 2)
    assert (half.kd_coef.steps, half.policy_coef.steps) == (70, 70)
    assert (half.kd_coef.initial, half.policy_coef.final) == (1.0, 1.0)
    assert ARMS["kdrl_step"].at(2.0, 3).kd_coef.values == (0.6, 0.2)


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.method])
@pytest.mark.parametrize("steps", [1, 2, 30, 280])
def test_every_arm_is_a_valid_run_of_any_length(name: str, steps: int, tmp_path: Path) -> None:
    config = StudyConfig(out=tmp_path, steps=steps)
    beta = 0.2 if ARMS[name].tuned else None
    trial = Trial(task="countdown", arm=name, learning_rate=1e-3, beta=beta, seed=3)
    made = train_config(config, trial)
    assert made.method == ARMS[name].at(beta, steps)
    assert (made.model.teacher is None) == (made.method.kd is None)
    other = train_config(config, replace(trial, arm="grpo", beta=None))
    teacher = replace(other.model, teacher=made.model.teacher)
    assert made == replace(other, out=made.out, method=made.method, model=teacher)


def test_the_control_has_no_teacher_in_its_gradient_and_the_method_has() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    tokens = torch.randint(9, (6,), generator=generator)
    advantages, beta = torch.randn(6, generator=generator).double(), torch.full((6,), 0.3).double()
    teachers = [torch.randn(9, 4, generator=generator, dtype=torch.float64) for _ in range(2)]

    def gradient(teacher: torch.Tensor) -> torch.Tensor:
        leaf = weight.clone().requires_grad_()
        out = kk.kdrl_loss(
            hidden, leaf, tokens, advantages=advantages, kd_weight=beta,
            teacher=kk.TeacherHead(hidden, teacher), objective=kk.Objective(kd_coef=1.0),
        )  # fmt: skip
        out.loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    leaf = weight.clone().requires_grad_()
    lp = (hidden @ leaf.T).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    lq = (hidden @ teachers[0].T).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    loss = (-advantages * (lp - lp.detach()).exp() + beta * (lp - lq)).mean()
    expected = torch.autograd.grad(loss, leaf)[0]
    with k1_as_loss():
        found = [gradient(teacher) for teacher in teachers]
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert (gradient(teachers[0]) - gradient(teachers[1])).abs().max() > 1e-3


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


def seen(mean: float, low: float, high: float) -> Estimate:
    return Estimate(mean, low, high, seeds=3)


@pytest.mark.parametrize(
    ("found", "expected", "kept"),
    [
        (seen(0.05, 0.03, 0.07), "as in the paper", "differs from the paper"),
        (seen(0.01, 0.005, 0.015), "as in the paper", "as in the paper"),
        (seen(0.0, -0.01, 0.01), "not decided here", "as in the paper"),
        (seen(0.0, -0.2, 0.2), "not decided here", "not decided here"),
        (seen(-0.01, -0.03, 0.01), "not decided here", "not decided here"),
        (seen(-0.05, -0.07, -0.03), "differs from the paper", "differs from the paper"),
        (Estimate(0.05, 0.03, 0.07), "one seed: not judged", "one seed: not judged"),
    ],
)
def test_verdicts_on_more_and_on_kept(found: Estimate, expected: str, kept: str) -> None:
    assert {one.arm for one in FINDINGS} | {one.other for one in FINDINGS} <= set(ARMS)
    assert analysis.verdict(FINDINGS[0], found) == expected
    assert analysis.verdict(Finding("?", "a", "b", "kept", expected=0), found) == kept


def test_what_the_paper_leaves_open_has_no_verdict_but_a_sign() -> None:
    one = Finding("?", "a", "b", "")
    assert analysis.verdict(one, seen(-0.1, -0.2, -0.05)) == "less"
    assert analysis.verdict(one, seen(0.0, -0.2, 0.2)) == "not decided here"


def test_what_differs_from_the_paper_is_said_first() -> None:
    wins, draws, loses = "4444", "0123", "0000"
    right = {"kdrl": draws, "grpo": wins, "kd_rkl": loses, "kdrl_k3": draws, "kdrl_exact": wins}
    study = Study(
        result(arm, digits, seed=seed) for arm, digits in right.items() for seed in range(3)
    )
    judged = analysis.judge(study, "arithmetic")
    assert [one.finding.question for one in judged] == [
        "KDRL against GRPO", "distillation against GRPO", "k2 against k3",
        "KDRL against distillation", "exact KL against k2, in KDRL",
    ]  # fmt: skip
    assert write_up.conclusion(study, "arithmetic") == (
        "On arithmetic. Differs from the paper: KDRL against GRPO; distillation against GRPO. Not "
        "decided here: k2 against k3. As in the paper: KDRL against distillation."
    )


def test_differences_are_paired_by_seed() -> None:
    runs = [result("kdrl", "2222", seed=0), result("kdrl", "4444", seed=1)]
    runs += [result("grpo", "1111", seed=0), result("grpo", "3333", seed=1)]
    runs += [result("grpo", "0000", seed=2)]  # kdrl has no such seed
    study = Study(runs)
    assert study.difference("arithmetic", "kdrl", "grpo") == Estimate(0.25, 0.25, 0.25, 2)
    shorter = study.pairs("arithmetic", "kdrl", "grpo", "length")
    assert shorter is not None
    assert shorter.tolist() == [[0.0], [0.0]]
    assert study.tokens_to("arithmetic", "grpo", 1.0)[0] == 1600
    sampled_elsewhere = replace(result("sft"), curve={}, sampled_tokens=5)
    assert Study([sampled_elsewhere]).tokens_to("arithmetic", "sft", 0.1) == []


def test_settings_at_an_end_of_their_sweep_are_marked(tmp_path: Path) -> None:
    config = StudyConfig(out=tmp_path)
    sweeps = [
        result("kdrl", learning_rate=rate, beta=beta, seed=1000, sweep=True)
        for rate, beta in ((2.5e-4, 0.2), (5e-4, 0.2), (1e-3, 0.2), (5e-4, 0.02), (5e-4, 2.0))
    ]
    study = Study([result("kdrl", learning_rate=5e-4, beta=2.0), *sweeps])
    assert tables.arms(study, config, "arithmetic").rows[0][1:3] == ["0.0005", "2*"]


def test_a_stage_of_half_the_steps_costs_half_a_step() -> None:
    one = result("opd_then_rl")
    seconds = {"seconds_rollout": [2.0, 2.0, 2.0, 9.0], "seconds_teacher": [1.0, 1.0, None, None]}
    study = Study([replace(one, curve=one.curve | seconds)])
    assert study.stage_seconds("arithmetic", "opd_then_rl") == {"rollout": 2.0, "teacher": 0.5}
    assert tables.cost(study, "arithmetic").rows[0][-2:] == ["2.500", "1.25"]


def test_tokens_until_half_way_and_until_the_teacher() -> None:
    runs = [result("student", "0000"), result("teacher", "4444"), result("grpo", "2222")]
    study = Study([*runs[:2], replace(runs[2], sampled_tokens=2000)])
    table = tables.reached(study, "arithmetic")
    assert table.columns[2:] == ["half way: 50.0%", "teacher: 100.0%"]
    assert table.rows == [["grpo", "2", "1", "2"]]  # 0.1 more each step of 100 tokens


def test_a_page_and_tables_of_a_half_finished_study(tmp_path: Path) -> None:
    config = StudyConfig(out=tmp_path, seeds=1)
    bad = replace(
        result("kd_rkl", learning_rate=1e-3),
        status="crashed", error=f"boom | {tmp_path}/x", scores={},
    )  # fmt: skip
    found = [result("student"), result("grpo", learning_rate=1e-3), bad]
    found += [result("teacher"), result("kdrl", "4444", learning_rate=1e-3, beta=0.2)]
    sweeps = [
        result("kdrl", learning_rate=1e-3, beta=b, seed=1000, sweep=True) for b in (0.02, 0.2)
    ]
    saved = results.save(config, {r.trial: r for r in [*found, *sweeps]})
    made = write_up.parts(Study(saved["trials"]), config, ["arithmetic"])
    text = write_up.markdown(["about"], made)
    assert "KDRL against GRPO | kdrl - grpo | +62.5" in text
    assert "| +62.5 | 56.8 against 54.6 | one seed: not judged |" in text
    assert "kd_rkl/middle-lr0.001-seed0 | boom \\| x" in text
    assert {name for part in made for name in part.plots} == {
        "differences_arithmetic", "accuracy_arithmetic", "beta", "cost_arithmetic",
    }  # fmt: skip
    again = [Result.read(_written(r, tmp_path)) for r in found]
    assert again == found


def test_every_question_of_the_paper_has_a_table_and_a_plot(tmp_path: Path) -> None:
    config = StudyConfig(out=tmp_path)
    runs = [
        result(arm, seed=seed, beta=0.2 if ARMS[arm].tuned else None)
        for arm in ARMS for seed in range(2)
    ]  # fmt: skip
    runs += [result(arm, teacher=t) for arm in ("teacher", "kdrl") for t in ("weak", "strong")]
    made = write_up.parts(Study(runs), config, ["arithmetic"])
    assert len(made[0].table.rows) == len(FINDINGS)
    assert set(plots.QUESTIONS) <= {name.removesuffix("_arithmetic") for name in made[0].plots}
    assert all(part.plots for part in made if "until" not in part.table.title)


def test_a_run_that_a_signal_ended_is_no_result(
    small: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "main", lambda made: made.out)  # as it returns then: without model/
    config = replace(small, out=tmp_path)
    trial = Trial(task="arithmetic", arm="grpo", learning_rate=1e-3, seed=0)
    folder = trial_folder(config, trial)
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text(json.dumps(asdict(trial)))
    with pytest.raises(SystemExit, match="was stopped before its last step"):
        finish(config, folder)
    assert not (folder / "result.json").exists()


def test_sigterm_ends_what_the_study_started(small: StudyConfig, tmp_path: Path) -> None:
    config = replace(small, out=tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with (  # noqa: PT012  the signal comes while it waits
        pytest.raises(SystemExit), command.ended_by_sigterm(), Runner(config, Console()) as runner
    ):  # fmt: skip
        runner._running.add(child)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert child.wait(timeout=10) == -signal.SIGKILL


def _written(one: Result, folder: Path) -> Path:
    one.write(folder / "result.json")
    return folder / "result.json"


@pytest.fixture(scope="module")
def small() -> StudyConfig:
    lab = LabConfig(problems=200, student_steps=2, teacher_steps=2)
    return StudyConfig(
        tasks=("arithmetic",), arms=("student", "sft", "kdrl"), quality_arms=(), seeds=1, steps=2,
        prompts_per_step=2, group_size=2, learning_rates=(1e-3,), betas=(0.2,), more_betas=(),
        validation_problems=4, test_problems=4, samples=2, arithmetic=lab, countdown=lab, workers=1,
    )  # fmt: skip


def test_a_study_goes_on_where_it_stopped_and_a_crash_is_a_result(
    small: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: the quick study, part of CI, runs in those it starts."""
    config = replace(small, out=tmp_path / "study")

    def process(_: Runner, names: list[str], told: Any) -> int:
        for name in names:
            folder = config.out / "trials" / name
            if not (folder / "trial.json").exists():
                sft.main(lab.model_config(config, *name.split("/")), Console(quiet=True))
                continue
            finish(config, folder)
            told(name)
        return 0

    monkeypatch.setattr(Runner, "_process", process)
    console = Console(quiet=True)
    command.main(replace(config, arms=("student",)), console)
    first = {p: p.stat().st_mtime_ns for p in config.out.rglob("*.safetensors")}
    assert first
    command.main(config, console)
    assert {p: p.stat().st_mtime_ns for p in first} == first
    table = (config.out / "README.md").read_text(encoding="utf-8")
    assert "| kdrl | 0.001 | 0.2 | 1 |" in table
    page = (config.out / "report.html").read_text(encoding="utf-8")
    assert "trials/arithmetic/kdrl/middle-lr0.001-beta0.2-seed0/run" in page
    assert str(tmp_path) not in page
    (config.out / "README.md").unlink()
    write_up.again(config.out)
    assert (config.out / "README.md").read_text(encoding="utf-8") == table
    trials = Study(results.load(config.out / "results.json")["trials"])
    assert len(trials.results) == 3
    assert [r.error for r in trials.crashed] == [
        "ValueError: the teacher must have right samples to learn from, got none in "
        f"{config.out}/tasks/arithmetic/teacher_middle"
    ]
    with pytest.raises(ValueError, match="steps 2 -> 3"):
        command.main(replace(config, steps=3), console)


def test_a_process_that_is_killed_is_reported_and_the_next_trial_runs(
    small: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(small, out=tmp_path)
    trials = [Trial(task="arithmetic", arm="grpo", learning_rate=1e-3, seed=s) for s in (0, 1)]
    starts: list[list[str]] = []

    def process(_: Runner, names: list[str], told: Any) -> int:
        starts.append(list(names))
        if len(starts) == 1:
            trial_folder(config, trials[0]).joinpath("log.txt").write_text("out of memory")
            return -9
        for trial in trials[1:]:
            result("grpo", learning_rate=1e-3, seed=1).write(
                trial_folder(config, trial) / "result.json"
            )
            told(trial.name)
        return 0

    monkeypatch.setattr(Runner, "_process", process)
    with Runner(config, Console(quiet=True)) as runner:
        runner._group(trials)
        found = runner.trials(trials, "two")
    assert [len(names) for names in starts] == [2, 1]
    assert [r.status for r in found.values()] == ["crashed", "done"]
    assert found[trials[0]].error == "exit code -9: out of memory"
    assert "CRASHED" in summary(found[trials[0]])


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 10}, r"samples must be in \[1, 9\], got 10"),
        ({"arms": ("kdlr",)}, "arms must be of .*, got 'kdlr'"),
        ({"betas": ()}, "betas must hold at least one number"),
        ({"learning_rates": (0.0,)}, "learning_rates"),
        ({"tasks": ()}, "tasks must name at least one task"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyConfig(**change)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files"):
        command.open_folder(StudyConfig(out=tmp_path))


def test_schedules_share_the_betas_that_are_compared() -> None:
    config = StudyConfig()
    shared = {config.betas_of("arithmetic", arm) for arm in SCHEDULES}
    assert shared == {(0.02, 0.063, 0.2, 0.63, 2.0)}
    assert config.betas_of("arithmetic", "kdrl_k3") == (0.02, 0.2, 2.0)
    assert config.betas_of("countdown", "kdrl") == (0.02, 0.2, 2.0)
