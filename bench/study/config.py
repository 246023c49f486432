"""Holds the settings of a study, and of each of its training runs."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bench.study.arms import ARMS
from kdrl_train.settings import (
    NaturalInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Switch,
    settings,
)
from kdrl_train.tools.toy.models import ArchitectureConfig, small_architecture

TaskName = Literal["arithmetic", "countdown"]
SWEEP_SEED = 1000
"""Seed of the runs that choose settings: it is not among the seeds that are reported."""
RUNOFF_SEED = SWEEP_SEED + 1
"""Seed of the second run of settings whose first run was close to the best."""


@settings
class TaskModelsConfig:
    """The models of a task, trained from scratch on worked solutions. Some solutions have slips
    (wrong calculations): a model that learns from them slips as often, which sets its accuracy."""

    level: str = "medium"
    """Difficulty of the problems: easy, medium or hard."""
    problems: PositiveInt = 20000
    """Problems to learn from, in supervised training and then in RL."""
    student_slips: Probability = 0.5
    """Probability of a slip in each step of the solutions that the student learns from."""
    student_hints: Probability = 0.0
    """Share of the problems that the student learns from with the answer behind the question, and
    without slips: such a student can read an answer that it is shown."""
    student_steps: PositiveInt = 600
    """Supervised steps of the student."""
    weak_slips: Probability = 0.4
    """Probability of a slip in the solutions that the weak teacher learns from."""
    middle_slips: Probability = 0.25
    """Probability of a slip for the middle teacher, which all arms use."""
    strong_slips: Probability = 0.1
    """Probability of a slip for the strong teacher."""
    teacher_steps: PositiveInt = 600
    """Supervised steps of a teacher."""
    batch_tokens: PositiveInt = 1792
    """Tokens of a supervised batch."""
    learning_rate: PositiveFloat = 5e-3
    """Peak learning rate of supervised training."""
    max_new_tokens: PositiveInt = 48
    """Longest completion, in tokens."""


def _countdown() -> TaskModelsConfig:
    """Models of the countdown task. Its solutions are hard to plan: models make errors without
    slips, more of them the less they learn. There are fewer different problems."""
    return TaskModelsConfig(
        problems=5500,
        student_slips=0.0,
        student_steps=450,
        weak_slips=0.2,
        middle_slips=0.0,
        strong_slips=0.0,
        teacher_steps=800,
    )


@settings
class StudyConfig:
    """A study: which arms run, with which sweeps and seeds, and what they are measured on."""

    out: Path = Path("runs/study")
    """Folder of the study. A study that stopped continues there, and repeats no finished run."""
    quick: Switch = False
    """A small study: one task, one seed, no sweep, 30 steps. Minutes on two CPU cores."""
    tasks: tuple[TaskName, ...] = ("arithmetic", "countdown")
    """Tasks. All arms run on the first one, and those in `main_arms` on the others."""
    arms: tuple[str, ...] = tuple(name for name, arm in ARMS.items() if not arm.successor)
    """Arms to run, by their names in bench/study/arms.py; those of the paper and its schedules."""
    main_arms: tuple[str, ...] = ("student", "teacher", "sft", "grpo", "kd_rkl", "kdrl")
    """Arms that run on every task, with more seeds on the first."""
    quality_arms: tuple[str, ...] = ("kd_rkl", "kdrl")
    """Arms that run with each of the three teachers, on the first task."""
    seeds: PositiveInt = 3
    """Reported runs of each arm. Seed s gives all arms the same prompts in the same order."""
    main_seeds: PositiveInt = 5
    """Reported runs of each arm in `main_arms`, on the first task."""
    steps: PositiveInt = 80
    """Optimiser steps of a run."""
    prompts_per_step: PositiveInt = 32
    """P: prompts per step."""
    group_size: Annotated[PositiveInt, Field(ge=2)] = 8
    """G: completions per prompt."""
    learning_rates: tuple[PositiveFloat, ...] = (2.5e-4, 5e-4, 1e-3)
    """Learning rates to try. They are swept for each arm, at the middle one of its betas."""
    betas: tuple[PositiveFloat, ...] = (0.02, 0.2, 2.0)
    """Betas to try. They are swept for each arm that has one, at its best learning rate."""
    more_betas: tuple[PositiveFloat, ...] = (0.063, 0.63)
    """More betas, which show how sensitive an arm is. They run on the first task, and settings are
    not chosen by them."""
    widen: NaturalInt = 2
    """How often a sweep may be widened. If the best value of a sweep on the first task is at an
    end, one more value is tried past that end, in the same ratio."""
    validation_problems: PositiveInt = 500
    """Problems that a sweep is measured on."""
    test_problems: PositiveInt = 1000
    """Problems in each set that arms are reported on."""
    samples: Annotated[PositiveInt, Field(le=9)] = 4
    """k of avg@k: completions per problem, at temperature 1."""
    workers: PositiveInt = 2
    """Runs at the same time, each with one CPU thread."""
    arithmetic: TaskModelsConfig = field(default_factory=TaskModelsConfig)
    countdown: TaskModelsConfig = field(default_factory=_countdown)
    student: ArchitectureConfig = field(default_factory=lambda: small_architecture(64))
    """Shape of the student."""
    teacher: ArchitectureConfig = field(default_factory=lambda: small_architecture(80))
    """Shape of the teachers."""
    device: str = "cpu"
    """Torch device of every run."""

    def __post_init__(self) -> None:
        for key in ("learning_rates", "betas"):
            if not getattr(self, key):
                raise ValueError(f"{key} must hold at least one number, got none")
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
