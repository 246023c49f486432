"""Settings of the optimiser, of evaluation and of what is logged."""

import re
from collections.abc import Mapping
from dataclasses import field, replace
from typing import Literal

from kdrl_train.config.rollouts import DataConfig, SamplingConfig
from kdrl_train.method.schedules import learning_rate
from kdrl_train.settings import (
    LearningRate,
    NaturalFloat,
    NaturalInt,
    PositiveFloat,
    PositiveInt,
    PositiveOrInf,
    Switch,
    UnitInterval,
    settings,
)

OF_BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
"""Names of optimisers of bitsandbytes, and their classes there."""


@settings
class OptimConfig:
    """The optimiser, and how completions are packed for it."""

    learning_rate: LearningRate = 1e-6
    """Peak learning rate of AdamW."""
    warmup_steps: NaturalInt = 0
    """Optimiser steps in which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up. constant: it stays. linear, cosine: it falls to
    final_learning_rate at the end of the run, so it is a function of the step and of `steps`: a run
    that is resumed with more steps goes on from the higher rate that these have then."""
    final_learning_rate: NaturalFloat = 0.0
    """Learning rate that linear and cosine reach at the end of the last step."""
    weight_decay: NaturalFloat = 0.0
    """Decoupled weight decay of AdamW. sgd adds this times the weight to the gradient."""
    betas: tuple[UnitInterval, UnitInterval] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    max_grad_norm: PositiveOrInf = 1.0
    """Largest norm of the gradient: a larger gradient is scaled down to it. inf: never."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens packed into one forward and backward pass. Results do not depend on it."""
    workspace_bytes: PositiveInt | None = None
    """Memory of the one-pass head, in bytes, without its inputs, outputs and gradients; None: the
    kernel's default, which follows from the memory of the whole GPU."""
    head_impl: Literal["triton", "torch", "reference"] | None = None
    """Implementation of the one-pass head; None: triton on a GPU, torch elsewhere."""
    updates_per_rollout: PositiveInt = 1
    """Optimiser updates in one step. The step's prompts are split into this many equal parts, and
    each part makes one update; each completion is used once. Above 1 the later updates are
    off-policy: the ratio is taken to the policy before the first update, which costs one more
    forward pass."""
    name: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """The optimiser. adamw_8bit: AdamW with moments of 8 bits; paged: its moments move to the CPU's
    memory while a GPU's is full. Both need one process and
    `pip install 'kdrl-kernels[bitsandbytes]'`."""
    momentum: UnitInterval = 0.0
    """Momentum of sgd: the share of the last step's direction that is kept."""

    def __post_init__(self) -> None:
        if self.momentum and self.name != "sgd":
            raise ValueError(
                f'name must be "sgd" with momentum {self.momentum}, got "{self.name}": AdamW\'s is '
                "the first of betas"
            )
        if self.name == "sgd" and self.betas != (0.9, 0.999):
            raise ValueError(
                f'name must be an AdamW with betas {self.betas}, got "sgd": set momentum'
            )
        if self.final_learning_rate and self.schedule == "constant":
            raise ValueError(
                'schedule must be "linear" or "cosine" with final_learning_rate '
                f'{self.final_learning_rate}, got "constant": set it, or final_learning_rate to 0'
            )
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate must be at most learning_rate, {self.learning_rate}, got "
                f"{self.final_learning_rate}"
            )

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, in a run of so many."""
        return learning_rate(
            self.learning_rate,
            self.warmup_steps,
            step,
            kind=self.schedule,
            final=self.final_learning_rate,
            steps=steps,
        )


@settings
class EvalConfig:
    """How the policy is measured during training."""

    data: DataConfig = field(default_factory=DataConfig)
    """Held-out problems, which are measured at every `every` steps; without a path nothing is."""
    sets: dict[str, DataConfig] = field(default_factory=dict, hash=False)
    """More held-out sets by name, each with the keys of `data`: {aime: {path: aime.jsonl}}. Their
    metrics are eval/aime/...; what follows a score, as a schedule, follows that of `data`."""
    every: NaturalInt = 0
    """Optimiser steps between evaluations; 0: none. The last step is evaluated too."""
    samples: PositiveInt = 4
    """k of avg@k, pass@k and maj@k: completions per problem."""
    greedy: Switch = False
    """Measure one completion per problem, of its most probable tokens, in place of `samples`."""
    temperature: PositiveFloat | None = None
    """Sampling temperature of an evaluation; None: sampling.temperature."""
    max_new_tokens: PositiveInt | None = None
    """Longest completion of an evaluation, in tokens; None: sampling.max_new_tokens."""
    max_problems: PositiveInt | None = None
    """Use only this many problems of each set, the first ones; None: all."""

    keep_best: Switch = False
    """Save a checkpoint where the avg@k of `data` is above every earlier one, and keep it until a
    better one is saved; best.json of the run's folder names it. The first of equal ones counts. At
    the end its model is written to model_best/, beside that of the last step."""

    def __post_init__(self) -> None:
        check_sets(self.sets, self.data)
        if self.keep_best and not self.sections:
            raise ValueError(
                f"keep_best must be false without every and data.path, got {self.every} and "
                f"{self.data.path!r} of them: nothing would be measured; set both"
            )
        if self.greedy and self.temperature is not None:
            raise ValueError(
                f"temperature must be None with greedy, got {self.temperature}: nothing is drawn"
            )

    @property
    def sections(self) -> dict[str, DataConfig]:
        """Section of the settings -> a set that is measured during training; `data` comes first."""
        if not (self.every and self.data.path):
            return {}
        return {"eval.data": self.data} | {f"eval.sets.{n}": one for n, one in self.sets.items()}

    def sampling(self, training: SamplingConfig) -> SamplingConfig:
        """How completions of an evaluation are sampled in a run that samples like this."""
        return replace(
            training,
            group_size=1 if self.greedy else self.samples,
            temperature=self.temperature or training.temperature,
            max_new_tokens=self.max_new_tokens or training.max_new_tokens,
        )


_SET_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")


def check_sets(sets: Mapping[str, DataConfig], data: DataConfig) -> None:
    """Raise ValueError for sets without a file, or whose names cannot be a part of keys."""
    if sets and not data.path:
        raise ValueError(
            f"data.path must be set beside sets, got only {', '.join(sets)}: the set in data is "
            "the one whose score counts"
        )
    for name, one in sets.items():
        if not _SET_NAME.fullmatch(name) or name == "data":
            raise ValueError(
                "sets must have names of letters, digits, _, . and -, at most 40, and not "
                f'"data", got {name!r}: rename it'
            )
        if not one.path:
            raise ValueError(f"sets.{name}.path must name a file, a folder or a hub id, got none")


@settings
class LogConfig:
    """What is logged besides metrics.jsonl, which every run writes."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go too: tensorboard, wandb, trackio. Each needs the extra of its name."""
    project: str = "kdrl"
    """Name of the project at wandb or trackio."""
    diagnostics_every: NaturalInt = 0
    """Optimiser steps between two measurements of the reward's gradient and the distillation's
    gradient: their norms and their cosine, on the step's first micro-batch, with model.teachers on
    the first one of each teacher. A measurement costs two more passes over it. 0: never."""

    def __post_init__(self) -> None:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers must name each tracker once, got {self.trackers}")
