"""Holds the settings of a study, and of each of its training runs."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from bench.study.arms import ARMS
from kdrl_train.config_file import at_least, positive
from kdrl_train.tools.toy.models import ArchitectureConfig

TaskName = Literal["arithmetic", "countdown"]
TeacherName = Literal["weak", "middle", "strong"]
SWEEP_SEED = 1000
"""Seed of the runs that choose settings: it is not among the seeds that are reported."""
RUNOFF_SEED = SWEEP_SEED + 1
"""Seed of the second run of settings whose first run was close to the best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskModelsConfig:
    """Settings of a task's student and teachers, trained from scratch on worked solutions.

    Some solutions have slips in them: a model that has learnt from slips samples slips as often,
    so their share sets how imperfect the model is.
    """

    level: str = "medium"
    """Difficulty of the problems: a level of kdrl_train/tools/toy."""
    problems: int = 20000
    """Training problems, for the supervised training and for the sampling."""
    student_slips: float = 0.5
    """Chance of a slip in each step of the solutions that the student learns from."""
    student_steps: int = 600
    """Supervised steps of the student."""
    weak_slips: float = 0.4
    """Chance of a slip for the weak teacher."""
    middle_slips: float = 0.25
    """Chance of a slip for the middle teacher, which teaches all arms."""
    strong_slips: float = 0.1
    """Chance of a slip for the strong teacher."""
    teacher_steps: int = 600
    """Supervised steps of a teacher."""
    batch_tokens: int = 1792
    """Tokens of a supervised batch."""
    learning_rate: float = 5e-3
    """Peak learning rate of supervised training."""
    max_new_tokens: int = 48
    """Longest completion, in tokens."""


def _countdown() -> TaskModelsConfig:
    """Return the models of countdown, whose number of supervised steps makes them imperfect.

    Its solutions are hard to find, so most models need no slips. It has fewer different problems.
    """
    return TaskModelsConfig(
        problems=5500,
        student_slips=0.0,
        student_steps=450,
        weak_slips=0.2,
        middle_slips=0.0,
        strong_slips=0.0,
        teacher_steps=800,
    )


def _architecture(hidden: int) -> ArchitectureConfig:
    return ArchitectureConfig(
        family="qwen3",
        hidden=hidden,
        layers=2,
        intermediate=hidden * 3 - hidden * 3 % 32,
        max_positions=128,
        rope_theta=100.0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """The settings of `python -m bench.study`: tasks, arms, sweeps, seeds and problems."""

    out: Path = Path("runs/study")
    """Folder of the study. A study that stopped continues there: finished runs are kept."""
    quick: bool = False
    """One task, five trained arms, one seed, no sweep, 30 steps: some minutes on two CPU cores."""
    tasks: tuple[TaskName, ...] = ("arithmetic", "countdown")
    """All arms run on the first task; the arms of `main_arms` run on the others."""
    arms: tuple[str, ...] = tuple(name for name in ARMS)
    """Arms to run, by their names in bench/study/arms.py."""
    main_arms: tuple[str, ...] = ("student", "teacher", "sft", "grpo", "kd_rkl", "kdrl")
    """Arms that run on every task, with more seeds on the first task."""
    quality_arms: tuple[str, ...] = ("kd_rkl", "kdrl")
    """Arms that run with each of the three teachers, on the first task."""
    seeds: int = 3
    """Reported runs of each arm. Seed s draws the same prompts in the same order in every arm."""
    main_seeds: int = 5
    """Reported runs of each arm of `main_arms` on the first task."""
    steps: int = 80
    """Optimiser steps of a run."""
    prompts_per_step: int = 32
    """P: prompts of a step."""
    group_size: int = 8
    """G: completions of a prompt."""
    learning_rates: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3)
    """Learning rates that are tried for each arm, at the middle one of its betas."""
    betas: tuple[float, ...] = (0.02, 0.2, 2.0)
    """Betas that are tried for each arm that has one, at its best learning rate."""
    more_betas: tuple[float, ...] = (0.063, 0.63)
    """Further betas of the arms whose sensitivity to beta is compared, on the first task. They
    choose no settings."""
    widen: int = 2
    """How often a sweep on the first task may add a value past its end, in the same ratio, when
    the best value is at that end."""
    validation_problems: int = 500
    """Problems by which a sweep chooses."""
    test_problems: int = 1000
    """Problems in each set that arms are reported on."""
    samples: int = 4
    """k of avg@k: completions of each problem, at temperature 1; at most 9."""
    workers: int = 2
    """Runs at the same time, each with one CPU thread."""
    arithmetic: TaskModelsConfig = field(default_factory=TaskModelsConfig)
    countdown: TaskModelsConfig = field(default_factory=_countdown)
    student: ArchitectureConfig = field(default_factory=lambda: _architecture(64))
    """Shape of the student."""
    teacher: ArchitectureConfig = field(default_factory=lambda: _architecture(80))
    """Shape of the teachers."""
    device: str = "cpu"
    """Torch device of every run."""

    def __post_init__(self) -> None:
        for name in (
            "seeds", "main_seeds", "steps", "prompts_per_step", "validation_problems",
            "test_problems", "workers",
        ):  # fmt: skip
            at_least(1, name, getattr(self, name))
        at_least(2, "group_size", self.group_size)
        at_least(0, "widen", self.widen)
        if not 1 <= self.samples <= 9:
            raise ValueError(f"samples must be in [1, 9], got {self.samples}")
        for key in ("learning_rates", "betas", "more_betas"):
            values = getattr(self, key)
            if not values and key != "more_betas":
                raise ValueError(f"{key} must hold at least one number, got none")
            for value in values:
                positive(key, value)
        for key in ("arms", "main_arms", "quality_arms"):
            for arm in getattr(self, key):
                if arm not in ARMS:
                    raise ValueError(f"{key} must be of {', '.join(ARMS)}, got {arm!r}")
        if not self.tasks:
            raise ValueError("tasks must name at least one task, got none")

    def seeds_of(self, task: str, arm: str) -> range:
        """Return the seeds of an arm's reported runs."""
        main = task == self.tasks[0] and arm in self.main_arms
        return range(self.main_seeds if main else self.seeds)

    def task_models(self, task: str) -> TaskModelsConfig:
        """Return the settings of a task's models."""
        return getattr(self, task)

    def arms_of(self, task: str) -> tuple[str, ...]:
        """Return the arms that run on a task."""
        if task == self.tasks[0]:
            return self.arms
        return tuple(arm for arm in self.arms if arm in self.main_arms)


def quick(config: StudyConfig) -> StudyConfig:
    """Return the settings of the small study: one learning rate and beta for all arms, no sweep."""
    return replace(
        config,
        tasks=config.tasks[:1],
        arms=("student", "teacher", "sft", "grpo", "kd_rkl", "kdrl", "kdrl_annealed"),
        quality_arms=(),
        seeds=1,
        main_seeds=1,
        steps=min(config.steps, 30),
        learning_rates=(5e-4,),
        betas=(0.2,),
        more_betas=(),
        test_problems=min(config.test_problems, 250),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A trial is one run: an arm at one learning rate, beta and seed, and its test problems."""

    task: str
    arm: str
    learning_rate: float | None = None
    """None: nothing is trained."""
    beta: float | None = None
    """None: the preset's, or the arm has none."""
    seed: int
    teacher: str = "middle"
    sweep: bool = False
    """Whether it is measured on the validation problems; else on test and out of distribution."""

    @property
    def name(self) -> str:
        """Name the trial by its folder inside the study's `trials`."""
        parts = [self.teacher]
        if self.learning_rate is not None:
            parts.append(f"lr{self.learning_rate:g}")
        if self.beta is not None:
            parts.append(f"beta{self.beta:g}")
        parts.append(f"sweep{self.seed}" if self.sweep else f"seed{self.seed}")
        return f"{self.task}/{self.arm}/{'-'.join(parts)}"
