"""Tests the study's arms, processes and folder, and runs one small study."""

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
from rich.console import Console

from bench.study import __main__ as command
from bench.study import results, setup, write_up
from bench.study import trial as trial_module
from bench.study.analysis import Study
from bench.study.arms import ARMS, PAPER_STEPS
from bench.study.config import StudyConfig, TaskModelsConfig, Trial
from bench.study.runner import Runner, summary
from bench.study.trial import TrialResult, finish, train_config, trial_folder
from kdrl_train import train
from kdrl_train.config_file import load_yaml, update
from kdrl_train.errors import RunError
from kdrl_train.method.presets import PRESETS
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.lock import RunLock
from kdrl_train.tools import sft
from kdrl_train.tools.toy.models import make_model, train_tokenizer
from tests.bench.study.study_results import result


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
    run = train_config(config, trial)
    assert run.method == ARMS[name].at(beta, steps)
    assert (run.model.teacher is None and not run.model.teachers) == (run.method.kd is None)
    other = train_config(config, replace(trial, arm="grpo", beta=None))
    model = replace(other.model, teacher=run.model.teacher)
    if ARMS[name].sketched:
        model = replace(model, head_backward="sketch", head_threshold=2.0**-3, head_flat=1e9)
    expected = update(replace(other, model=model), ARMS[name].settings)
    assert run == replace(expected, out=run.out, method=run.method, model=run.model)
    if not ARMS[name].settings:
        assert run.model == model


def test_a_run_that_a_signal_ended_is_no_result(
    small: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what train.main returns then: a run folder without model/
    monkeypatch.setattr(train, "main", lambda run, **_: run.out)
    config = replace(small, out=tmp_path)
    trial = Trial(task="arithmetic", arm="grpo", learning_rate=1e-3, seed=0)
    folder = trial_folder(config, trial)
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text(json.dumps(asdict(trial)))
    with pytest.raises(SystemExit, match="was stopped before its last step"):
        finish(config, folder)
    assert not (folder / "result.json").exists()


@pytest.mark.fault("two runs in one folder")
def test_a_second_study_is_refused_and_changes_nothing(small: StudyConfig, tmp_path: Path) -> None:
    config = replace(small, out=tmp_path / "study")
    with RunLock(config.out):
        command.open_folder(config)
        text = (config.out / "study.yaml").read_text(encoding="utf-8")
        with pytest.raises(RunError, match=f"got a second one while process {os.getpid()} on"):
            command.main(replace(config, seeds=2), Console(quiet=True))
        assert (config.out / "study.yaml").read_text(encoding="utf-8") == text


@pytest.mark.fault("flipped or cut file")
@pytest.mark.parametrize(("old", "new"), [("}", ""), ('"trial"', '"trail"'), ("{", "["), ("0", "")])
def test_a_damaged_result_is_named(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "result.json"
    result("grpo", 0.5).write(path)
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"result\.json must hold .* delete it, and the trial"):
        TrialResult.read(path)


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


@pytest.fixture(scope="module")
def small() -> StudyConfig:
    models = TaskModelsConfig(problems=200, student_steps=2, teacher_steps=2)
    return StudyConfig(
        tasks=("arithmetic",), arms=("student", "sft", "kdrl", "kdrl_sketch"), quality_arms=(),
        seeds=1, main_seeds=1, steps=2, prompts_per_step=2, group_size=2, learning_rates=(1e-3,),
        betas=(0.2,), more_betas=(), validation_problems=4, test_problems=4, samples=2,
        arithmetic=models, countdown=models, workers=1,
    )  # fmt: skip


def test_specialists_and_hints_are_in_what_a_model_learns_from(
    small: StudyConfig, tmp_path: Path
) -> None:
    models = replace(small.arithmetic, student_hints=0.5, student_slips=1.0, strong_slips=0.0)
    config = replace(small, out=tmp_path, arithmetic=models)
    setup.write_task(config, "arithmetic")
    folder = setup.folder(config, "arithmetic")
    rows = {path.stem: jsonl.read(path) for path in folder.glob("*.jsonl")}
    right = {row["question"]: row for row in rows["train"]}
    assert {row["domain"] for row in rows["train"]} == set(setup.DOMAINS)
    for kind in setup.DOMAINS:
        for row in rows[f"solutions_teacher_{kind}"]:
            good = right[row["question"]]
            assert (row["solution"] == good["solution"]) == (good["domain"] == kind)
    hinted = [row for row in rows["solutions_student"] if " " in row["question"]]
    assert 60 < len(hinted) < 140
    for row in hinted:
        question, answer = row["question"].split()
        assert (answer, row["solution"]) == (right[question]["answer"], right[question]["solution"])


def test_the_settings_of_an_arm_name_files_of_its_task(
    small: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = replace(ARMS["kdrl"], settings={"model": {"teacher": "{task}/teacher_sum"}})
    monkeypatch.setattr(trial_module, "ARMS", {**ARMS, "kdrl": arm})
    run = train_config(small, Trial(task="arithmetic", arm="kdrl", learning_rate=1e-3, seed=0))
    assert run.model.teacher == str(setup.folder(small, "arithmetic") / "teacher_sum")


@pytest.mark.slow  # .ci/run makes the quick study
def test_a_study_goes_on_where_it_stopped_and_a_crash_is_a_result(
    small: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study runs in this process here; the quick study of CI runs in processes of its own."""
    config = replace(small, out=tmp_path / "study")

    def process(_: Runner, names: list[str], tell: Any) -> int:
        for name in names:
            folder = config.out / "trials" / name
            if not (folder / "trial.json").exists():
                sft.main(setup.model_config(config, *name.split("/")), Console(quiet=True))
                continue
            finish(config, folder)
            tell(name)
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
    assert len(trials.results) == 4
    (twin,) = trials.runs("arithmetic", "kdrl_sketch").values()
    assert twin.curve["sketch_flat_share"] == [0.0, 0.0]
    assert all(0.01 < (noise or 0) < 1 for noise in twin.curve["sketch_noise"])
    assert [r.error for r in trials.crashed] == [
        "ValueError: the teacher must give right samples, got none from "
        f"{config.out}/tasks/arithmetic/teacher_middle"
    ]
    with pytest.raises(ValueError, match=r"tasks must begin with arithmetic, .* got countdown"):
        command.main(replace(config, tasks=("countdown",)), console)
    with pytest.raises(ValueError, match="steps 2 -> 3"):
        command.main(replace(config, steps=3), console)


@pytest.mark.parametrize(
    ("log", "end"),
    [("out of memory", "out of memory"), (None, "no log was begun: its message is above")],
    ids=["log", "no_log"],
)
def test_a_process_that_is_killed_is_reported_and_the_next_trial_runs(
    log: str | None,
    end: str,
    small: StudyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(small, out=tmp_path)
    trials = [Trial(task="arithmetic", arm="grpo", learning_rate=1e-3, seed=s) for s in (0, 1)]
    starts: list[list[str]] = []

    def process(_: Runner, names: list[str], tell: Any) -> int:
        starts.append(list(names))
        if len(starts) == 1:
            if log is not None:
                trial_folder(config, trials[0]).joinpath("log.txt").write_text(log)
            return -9
        for trial in trials[1:]:
            result("grpo", learning_rate=1e-3, seed=1).write(
                trial_folder(config, trial) / "result.json"
            )
            tell(trial.name)
        return 0

    monkeypatch.setattr(Runner, "_process", process)
    with Runner(config, Console(quiet=True)) as runner:
        runner._group(trials)
        results_by_trial = runner.trials(trials, "two")
    assert [len(names) for names in starts] == [2, 1]
    assert [r.status for r in results_by_trial.values()] == ["crashed", "done"]
    assert results_by_trial[trials[0]].error == f"exit code -9: {end}"
    assert "CRASHED" in summary(results_by_trial[trials[0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 10}, "samples must be at most 9, got 10"),
        ({"arms": ("kdlr",)}, "arms must be of .*, got 'kdlr'"),
        ({"betas": ()}, "betas must hold at least one number"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"group_size": 1}, "group_size must be at least 2, got 1"),
        ({"widen": -1}, "widen must be at least 0, got -1"),
        ({"learning_rates": (0.0,)}, r"learning_rates\[0\] must be greater than 0, got 0\.0"),
        ({"tasks": ()}, "tasks must name at least one task"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyConfig(**change)


@pytest.mark.parametrize(("name", "millions"), [("student", 12), ("teacher", 21)])
def test_the_gpu_study_has_models_of_the_size_it_says(name: str, millions: int) -> None:
    path = Path(__file__).parents[3] / "bench/study/gpu.yaml"
    config = update(StudyConfig(), load_yaml(path))
    tokenizer = train_tokenizer(["1 + 2 = 3"], vocab_size=setup.VOCABULARY)
    model = make_model(getattr(config, name), tokenizer, seed=0)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files"):
        command.open_folder(StudyConfig(out=tmp_path))
