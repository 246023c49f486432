"""The run configuration: every number that changes a run, with its unit."""

from dataclasses import field
from pathlib import Path
from typing import Literal

from kdrl_train.config.learning import EvalConfig, LogConfig, OptimConfig, check_sets
from kdrl_train.config.models import (
    DEFAULT_TEACHER,
    REFERENCE,
    LoraConfig,
    ModelConfig,
    TeacherConfig,
)
from kdrl_train.config.rollouts import DataConfig, EngineConfig, RewardConfig, SamplingConfig
from kdrl_train.method.config import MethodConfig
from kdrl_train.settings import (
    NaturalInt,
    PositiveFloat,
    PositiveInt,
    Switch,
    SwitchOrAuto,
    settings,
)
from kdrl_train.watch import RanksConfig

__all__ = [
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "EvaluateConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardConfig",
    "SamplingConfig",
    "TeacherConfig",
    "TrainConfig",
]


@settings
class TrainConfig:
    """One training run; saved as config.yaml in its folder."""

    out: Path = Path("runs/train")
    """Run folder. It gets config.yaml, metrics.jsonl, samples/, checkpoints/ and model/."""
    resume: SwitchOrAuto = False
    """Continue from the newest checkpoint in `out`; auto: if it holds a run, else start. Without
    this a used folder is refused. A scheduler that runs the same command again needs auto."""
    allow_changes: tuple[
        Literal[
            "optim.learning_rate",
            "optim.schedule",
            "optim.final_learning_rate",
            "optim.warmup_steps",
        ],
        ...,
    ] = ()
    """Settings that this start may change with `resume`, though they change the training. The log
    says from which step on. It holds for one start."""
    seed: NaturalInt = 0
    """Seed: all random numbers are a function of the seed and the step."""
    steps: PositiveInt = 280
    """Optimiser steps of the whole run."""
    save_every: PositiveInt = 50
    """Optimiser steps between checkpoints. The last step is always saved."""
    save_async: Switch = False
    """Copy the state to CPU memory and write the checkpoint while the next step trains, instead of
    waiting for the disk. If writing fails, the run stops after that step and says why."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep; older ones are deleted."""
    keep_every: NaturalInt = 0
    """Checkpoints whose step is a multiple of this are never deleted; 0: none of them is kept."""
    checkpoint_hashes: Switch = True
    """Save a SHA-256 of each file of a checkpoint, and compare it before the file is read. false:
    neither, for terabytes, which one core hashes at 1 to 2 GB/s."""
    samples_per_step: NaturalInt = 8
    """Completions that each step writes to samples/, with their prompts and rewards."""
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)

    def __post_init__(self) -> None:
        compares = self.method.policy != "off" and self.method.advantage != "constant"
        if compares and self.sampling.group_size < 2:
            raise ValueError(
                "sampling.group_size must be at least 2 for a policy gradient, got "
                f"{self.sampling.group_size}: advantages compare completions of one prompt"
            )
        weights = [part.weight for part in self.reward.parts]
        unfined = not (self.reward.overlong_buffer and self.reward.overlong_penalty)
        if compares and self.method.kd != "reward" and unfined and not any(weights):
            raise ValueError(
                "reward.functions must have one with a weight other than 0 for a policy gradient, "
                f"got {len(weights)} of weight 0: set a weight, or method.policy to off"
            )
        if self.optim.head_impl == "reference" and self.model.head_backward != "exact":
            raise ValueError(
                'model.head_backward must be "exact" with optim.head_impl "reference", got '
                f'"{self.model.head_backward}"'
            )
        if self.sampling.prompts_per_step % self.optim.updates_per_rollout:
            raise ValueError(
                "sampling.prompts_per_step must be a multiple of optim.updates_per_rollout, got "
                f"{self.sampling.prompts_per_step} and {self.optim.updates_per_rollout}"
            )
        if self.optim.schedule != "constant" and self.optim.warmup_steps >= self.steps:
            raise ValueError(
                f"optim.warmup_steps must be less than steps with optim.schedule "
                f'"{self.optim.schedule}", got {self.optim.warmup_steps} and {self.steps}'
            )
        if self.reward.overlong_buffer > self.sampling.max_new_tokens:
            raise ValueError(
                "reward.overlong_buffer must be at most sampling.max_new_tokens, got "
                f"{self.reward.overlong_buffer} and {self.sampling.max_new_tokens}"
            )
        for key, schedule in self.method.schedules.items():
            if schedule.kind == "reward_adaptive" and self.sampling.group_size < 2:
                raise ValueError(
                    f'sampling.group_size must be at least 2 for {key}.kind "reward_adaptive", '
                    f"got {self.sampling.group_size}: with one completion beta would always be 0"
                )
            if schedule.waits_for_plateau and not (self.eval.every and self.eval.data.path):
                raise ValueError(
                    f"eval.every and eval.data.path must be set when {key} switches on a plateau, "
                    f"got {self.eval.every} and {self.eval.data.path!r}: set them, or "
                    f"{key}.patience to 0"
                )
        if self.method.is_topk and self.model.tensor_parallel > 1:
            raise ValueError(
                f'model.tensor_parallel must be 1 with method.kd "{self.method.kd}", got '
                f"{self.model.tensor_parallel}: the likeliest tokens are searched on one rank; use "
                'method.kd "rkl"'
            )
        self._check_teachers()
        if self.model.teacher_servers:
            self._check_server()
        self._check_teacher_prompts()

    def is_saved(self, done: int) -> bool:
        """Whether a checkpoint follows on `done` optimiser steps."""
        kept = self.keep_every > 0 and done % self.keep_every == 0
        return done % self.save_every == 0 or kept or done == self.steps

    def _check_teachers(self) -> None:
        """Raises ValueError where the parts of the settings about several teachers do not fit."""
        teachers, column = self.model.teachers, self.data.teacher_column
        if teachers and column is None:
            raise ValueError(
                f"data.teacher_column must be set with model.teachers, got {', '.join(teachers)}: "
                "it names the column that says which of them teaches a problem"
            )
        if column is not None and not teachers:
            raise ValueError(
                f"model.teachers must be set with data.teacher_column, got {column!r} and no "
                "teachers: name them, or leave data.teacher_column out"
            )
        servers = self.model.teacher_servers
        for key in ("heads", "names"):
            for name in getattr(self.teacher, key):
                if name not in servers or name == DEFAULT_TEACHER:
                    raise ValueError(
                        f"teacher.{key}.{name} must be of one of model.teachers behind a URL, got "
                        f"{', '.join(servers) or 'none'}: correct the name; teacher.{key[:-1]} is "
                        "that of model.teacher"
                    )
        for name in self.method.teachers:
            if not teachers or name not in set(self.model.teacher_places) - {REFERENCE}:
                known = ", ".join(self.model.teacher_places) if teachers else "no model.teachers"
                raise ValueError(
                    f"method.teachers.{name} must be one of several teachers, got {known}: correct "
                    "the name, or set method.kd_coef and method.kd_mask for a single teacher"
                )

    def _check_teacher_prompts(self) -> None:
        """Raises ValueError for a teacher that has nothing to say, and a template without one."""
        template, live = self.data.teacher_template, self.model.self_teacher == "live"
        if self.method.kd is not None and live and template is None:
            raise ValueError(
                'data.teacher_template must be set with model.self_teacher "live", got None: after '
                "the same prompt the policy's own weights say what it says, and the gradient is 0; "
                'set it, or self_teacher to "frozen" or "ema"'
            )
        sections = {"eval.data": self.eval.data}
        sections |= {f"eval.sets.{name}": one for name, one in self.eval.sets.items()}
        for section, one in sections.items():
            if one.teacher_template is not None:
                raise ValueError(
                    f"{section}.teacher_template must be None, got {one.teacher_template!r}: no "
                    "teacher reads the held-out problems"
                )

    def _check_server(self) -> None:
        """Raises ValueError for what a server cannot give, or what it gives cannot be used for."""
        method, servers = self.method, self.model.teacher_servers
        bare = [name for name in servers if self.teacher.of(name).head is None]
        if method.is_exact and bare:
            topk = '"topk_rkl", ' if self.model.teacher_api == "kdrl" else ""
            reader, instead = f'kd "{method.kd}"', f'set method.kd to {topk}"k2" or "k3"'
            if method.kd_baseline is not None:
                reader, instead = f"kd_baseline {method.kd_baseline}", "leave kd_baseline out"
            raise ValueError(
                f"{self.teacher.head_key(bare[0])} must be set for method.{reader} with a teacher "
                "behind a URL, got nothing: set it to the folder or hub id of the served model, "
                f"whose LM head alone is read; or {instead}; or load the teacher here "
                "(model.teacher: its folder)"
            )
        if method.is_topk and self.model.teacher_api != "kdrl":
            raise ValueError(
                f'model.teacher_api must be "kdrl" for method.kd "{method.kd}" with a teacher '
                f'behind a URL, got "{self.model.teacher_api}": the likeliest tokens of such '
                "servers are not read; serve the teacher with `python -m kdrl_train serve`"
            )
        if method.is_exact and self.model.tensor_parallel > 1:
            raise ValueError(
                f'model.tensor_parallel must be 1 for method.kd "{method.kd}" and kd_baseline '
                f"{method.kd_baseline} with a teacher behind a URL, got "
                f"{self.model.tensor_parallel}: each rank has the teacher's whole head; load the "
                "teacher here (model.teacher: its folder)"
            )
        sampled_alone = self.model.teacher_api == "openai" and not method.is_exact
        if sampled_alone and self.sampling.temperature != 1.0:
            raise ValueError(
                'sampling.temperature must be 1 with model.teacher_api "openai", got '
                f"{self.sampling.temperature}: such servers give prompt log-probabilities at 1, "
                "whatever is asked; serve the teacher with `python -m kdrl_train serve`"
            )


@settings
class EvaluateConfig:
    """One measurement of a saved model: `python -m kdrl_train eval`."""

    out: Path | None = None
    """JSON file for the numbers; None: only the table on the screen."""
    checkpoint_hashes: Switch = True
    """Compare the files of model.weights with their SHA-256 before they are read."""
    seed: NaturalInt = 0
    """Seed of the sampling."""
    samples: PositiveInt = 4
    """k of avg@k, pass@k and maj@k: completions per problem."""
    greedy: Switch = False
    """Measure one completion per problem, of its most probable tokens, in place of `samples`."""
    max_problems: PositiveInt | None = None
    """Use only this many problems of each set, the first ones; None: all."""
    max_sampler_mismatch: PositiveFloat | None = None
    """Largest allowed difference, in nats and on average, between the log-probabilities at which
    completions are sampled and those that the model has for a few of them alone. Above it the
    measurement stops. None: 1e-3 in float32, 0.05 in bfloat16."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sets: dict[str, DataConfig] = field(default_factory=dict, hash=False)
    """More sets by name, each with the keys of `data`: {aime: {path: aime.jsonl}}."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        check_sets(self.sets, self.data)
