"""The study's settings, and what one training run of it is."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from bench.study.arms import ARMS
from kdrl_train.config_file import at_least, positive
from kdrl_train.tools.toy.models import ArchitectureConfig

TaskName = Literal["arithmetic", "countdown"]
TeacherName = Literal["weak", "middle", "strong"]
SWEEP_SEED = 1000
"""Of the runs that settings are chosen by: not among the seeds that are reported."""
RUNOFF_SEED = SWEEP_SEED + 1
"""Of the second run of settings that the first cannot tell from the best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabConfig:
    """The models of a task, trained from scratch on worked solutions, some with slips in them: a
    model that has seen slips samples slips as often, and so is as imperfect as is asked for."""

    level: str = "medium"
    """Difficulty of the problems, see kdrl_train/tools/toy."""
    problems: int = 20000
    """Problems to learn from, supervised and then by sampling."""
    student_slips: float = 0.5
    """Chance of a slip in each step of the solutions that the student learns from."""
    student_steps: int = 600
    """Supervised steps of the student."""
    weak_slips: float = 0.4
    """The same for the solutions of the weak teacher."""
    middle_slips: float = 0.25
    """Of the teacher of all arms."""
    strong_slips: float = 0.1
    """Of the strong teacher."""
    teacher_steps: int = 600
    """Supervised steps of a teacher."""
    batch_tokens: int = 1792
    """Tokens of a supervised batch."""
    learning_rate: float = 5e-3
    """Peak learning rate of supervised training."""
    max_new_tokens: int = 48
    """Longest completion, in tokens."""


def _countdown() -> LabConfig:
    """Its solutions are hard to plan: models are imperfect without slips, by how long they learn.
    There are fewer different problems."""
    return LabConfig(
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
    """`python -m bench.study`: arms, their sweeps, seeds, and where it all is measured."""

    out: Path = Path("runs/study")
    """Folder of the study. One that stopped goes on there: a run that ended is not done again."""
    quick: bool = False
    """One task, five arms, one seed, no sweep, 30 steps: some minutes on two CPU cores."""
    tasks: tuple[TaskName, ...] = ("arithmetic", "countdown")
    """All arms run on the first one; the arms of `main_arms` on the others."""
    arms: tuple[str, ...] = tuple(name for name in ARMS)
    """Which arms of bench/study/arms.py."""
    main_arms: tuple[str, ...] = ("student", "teacher", "sft", "grpo", "kd_rkl", "kdrl")
    """Arms that the other tasks have too, and that have more seeds on the first."""
    quality_arms: tuple[str, ...] = ("kd_rkl", "kdrl")
    """Arms that run with each of the three teachers, on the first task."""
    seeds: int = 3
    """Runs of each arm that is reported; seed s has the same prompts in the same order in all."""
    main_seeds: int = 5
    """The same, of the arms of `main_arms` on the first task."""
    steps: int = 80
    """Optimiser steps of a run."""
    prompts_per_step: int = 32
    """P: prompts of a step."""
    group_size: int = 8
    """G: completions of a prompt."""
    learning_rates: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3)
    """Swept for each arm, at the middle one of its betas."""
    betas: tuple[float, ...] = (0.02, 0.2, 2.0)
    """Swept for each arm that has a beta, at its best learning rate."""
    more_betas: tuple[float, ...] = (0.063, 0.63)
    """Run too, on the first task, for the arms whose sensitivity to beta is compared; settings are
    not chosen by them."""
    widen: int = 2
    """How often a sweep on the first task may go on, in the same ratio, past an end that is its
    best."""
    validation_problems: int = 500
    """Problems that the sweep is judged by."""
    test_problems: int = 1000
    """Problems of each set that arms are reported on."""
    samples: int = 4
    """k of avg@k: completions of each problem, at temperature 1; at most 9."""
    workers: int = 2
    """Runs at a time, one CPU thread each."""
    arithmetic: LabConfig = field(default_factory=LabConfig)
    countdown: LabConfig = field(default_factory=_countdown)
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
        """Of the runs of an arm that are reported."""
        main = task == self.tasks[0] and arm in self.main_arms
        return range(self.main_seeds if main else self.seeds)

    def lab(self, task: str) -> LabConfig:
        """The models of a task."""
        return getattr(self, task)

    def arms_of(self, task: str) -> tuple[str, ...]:
        """The arms that run on a task."""
        if task == self.tasks[0]:
            return self.arms
        return tuple(arm for arm in self.arms if arm in self.main_arms)


def quick(config: StudyConfig) -> StudyConfig:
    """The small study: one learning rate and one beta for all arms, not swept."""
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
    """One run: an arm at given settings, and what it is measured on."""

    task: str
    arm: str
    learning_rate: float | None = None
    """None: nothing is trained."""
    beta: float | None = None
    """None: the preset's own, or none."""
    seed: int
    teacher: str = "middle"
    sweep: bool = False
    """Measured on the validation problems; else on test and out of distribution."""

    @property
    def name(self) -> str:
        """Its folder inside the study's `trials`."""
        parts = [self.teacher]
        if self.learning_rate is not None:
            parts.append(f"lr{self.learning_rate:g}")
        if self.beta is not None:
            parts.append(f"beta{self.beta:g}")
        parts.append(f"sweep{self.seed}" if self.sweep else f"seed{self.seed}")
        return f"{self.task}/{self.arm}/{'-'.join(parts)}"
