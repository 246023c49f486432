"""The run configuration: every number that changes a run, with its unit."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kdrl_train.config_file import at_least, in_unit_interval, positive
from kdrl_train.method.config import MethodConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which models run, and in which precision."""

    policy: str = ""
    """Folder or hub id of the policy (student) at step 0: any causal LM of transformers."""
    teacher: str | None = None
    """Folder or hub id of the teacher, with the policy's tokenizer, or the URL of a server that
    scores with it (http://host:port). Needed if method.kd is set; `eval` reads only its
    vocabulary's size: columns that it lacks were not sampled in training."""
    teacher_api: Literal["kdrl", "openai"] = "kdrl"
    """What a teacher behind a URL speaks: kdrl (`python -m kdrl_train serve`) or openai (vLLM and
    others whose /v1/completions returns prompt log-probabilities)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass, and of the teacher. The policy's weights and
    AdamW's moments stay float32: at a learning rate of 1e-6 a bfloat16 weight would not move."""
    device: str = "auto"
    """Torch device of the run; auto: cuda where there is one, else cpu."""
    attention: str | None = None
    """Attention of transformers, by its name; None: flash_attention_2 on a GPU in bfloat16 where
    flash-attn is installed, else our own `packed`: a packed row costs what its sequences cost."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    offload_policy: bool = False
    """Keep the policy's shards, gradients and AdamW moments in CPU memory (torchrun, GPUs)."""
    offload_teacher: bool = False
    """Keep the teacher's shards in CPU memory (torchrun, GPUs)."""
    weights: Path | None = None
    """A checkpoint folder (runs/x/checkpoints/step_000050), of a run with the same architecture,
    whose weights, and nothing else, replace those of `policy` at step 0."""
    liger: bool = False
    """RMSNorm, SwiGLU and RoPE of both models by liger-kernel; needs a GPU with Triton, and
    `pip install 'kdrl-kernels[liger]'`."""

    @property
    def teacher_is_url(self) -> bool:
        """Whether the teacher runs in a server, and not in this process."""
        return self.teacher is not None and self.teacher.startswith(("http://", "https://"))


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """How a teacher behind a URL is asked; results do not depend on it."""

    name: str | None = None
    """Model to ask for where an openai server has several; None: its only one."""
    concurrency: int = 64
    """Completions on their way to the server at a time."""
    timeout_s: float = 120.0
    """Deadline of one request, in seconds; after it the request is sent again."""
    deadline_s: float = 1800.0
    """Seconds without any answer after which the run stops, with a checkpoint. Until then it waits
    and goes on where it was when the teacher is back."""

    def __post_init__(self) -> None:
        at_least(1, "teacher.concurrency", self.concurrency)
        positive("teacher.timeout_s", self.timeout_s)
        positive("teacher.deadline_s", self.deadline_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where prompts and gold answers come from."""

    path: str = ""
    """A .jsonl or .parquet file, a folder of them, or a hub id."""
    split: str = "train"
    """Split to read, for hub ids and folders that have several."""
    prompt_column: str = "question"
    """Column with the problem's text."""
    answer_column: str = "answer"
    """Column with the gold answer; of a text with `####` the part after it counts (GSM8K)."""
    prompt_template: str = "{prompt}"
    """Text around each problem; {prompt} stands for the problem."""
    chat_template: bool = True
    """Apply the tokenizer's chat template where it has one; otherwise the text is sent as it is."""
    system_prompt: str | None = None
    """System message, when a chat template is applied."""
    max_prompt_tokens: int = 1024
    """A longer prompt stops the run before it starts, in tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How completions are drawn: no top-k, no top-p, the policy's own distribution."""

    prompts_per_step: int = 64
    """P: prompts per optimiser step."""
    group_size: int = 8
    """G: completions per prompt. Advantages are centred inside a group."""
    max_new_tokens: int = 1024
    """Longest completion, in tokens; a longer one is cut, counted, and earns what it earns."""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities and the loss, the teacher's included, are taken at
    the same temperature."""
    batch_size: int = 256
    """Completions generated at a time: bounds the memory of the key-value cache."""

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "group_size", "max_new_tokens", "batch_size"):
            at_least(1, f"sampling.{name}", getattr(self, name))
        positive("sampling.temperature", self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Who samples the completions."""

    kind: Literal["generate", "continuous", "vllm", "vllm_server"] = "generate"
    """transformers' `generate`, from the policy itself, under torchrun from a whole copy on each
    rank; its continuous batching, always from a copy, for GPUs; vLLM in this process, from a copy
    on each rank; or a vLLM server, which all ranks share."""
    url: str | None = None
    """Where the server of `vllm_server` is: http://host:port. It must see the run's folder, through
    which it gets the weights."""
    timeout_s: float = 1800.0
    """Longest wait for one answer of that server, in seconds; past it the run stops."""
    memory_share: float = 0.4
    """Share of a GPU's memory (on a CPU: of the machine's) that `vllm` takes for its copy and its
    keys and values."""
    eager: bool = False
    """`vllm` without CUDA graphs: starts sooner, takes less memory, samples slower."""
    max_sampler_mismatch: float | None = None
    """Largest mean difference between the log-probabilities of engine and trainer for the tokens
    of a step, in nats, beyond which the run stops; None: 1e-3 in float32, 0.05 in bfloat16."""
    staleness: Literal[0, 1] = 0
    """1: each step's completions, but the first's, are drawn and verified while the step before
    trains, by a copy of the weights that it starts from. They are off-policy by one step: the ratio
    is taken to the policy that sampled (with method.sampler_correction: see terms.py)."""

    def __post_init__(self) -> None:
        if self.max_sampler_mismatch is not None:
            positive("engine.max_sampler_mismatch", self.max_sampler_mismatch)
        positive("engine.timeout_s", self.timeout_s)
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"engine.memory_share must be in (0, 1], got {self.memory_share}")
        if (self.url is not None) != (self.kind == "vllm_server"):
            raise ValueError(
                'engine.url must be set for engine.kind "vllm_server", and for no other, got '
                f'{self.url} and "{self.kind}"'
            )

    def allowed_mismatch(self, dtype: str) -> float:
        """The largest sampler mismatch for a model.dtype, in nats."""
        return self.max_sampler_mismatch or {"float32": 1e-3, "bfloat16": 0.05}[dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """How a completion becomes a number."""

    function: str = "math"
    """`math` (math-verify on the last boxed or stated answer), `exact`, or `module:function`."""
    timeout_s: float = 5.0
    """Deadline per completion, in seconds; past it it counts as wrong, and as a timeout."""
    workers: int = 2
    """Verifier processes."""

    def __post_init__(self) -> None:
        positive("reward.timeout_s", self.timeout_s)
        at_least(1, "reward.workers", self.workers)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and the packing of its batches."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""
    micro_batch_tokens: int = 8192
    """Tokens packed into one forward and backward pass; results do not depend on it."""
    workspace_bytes: int | None = None
    """Memory of the one-pass head beyond inputs, outputs and gradients; None: its default."""
    head_impl: Literal["triton", "torch", "reference"] | None = None
    """Implementation of the one-pass head; None: Triton on a GPU, PyTorch elsewhere."""
    updates_per_rollout: int = 1
    """Optimiser updates of one step: its prompts in so many equal parts, each with all completions
    of its prompts, one update a part; each completion is used once. Above 1 the later updates are
    off-policy: the ratio is taken to the policy before the first, at a forward pass more."""

    def __post_init__(self) -> None:
        positive("optim.learning_rate", self.learning_rate)
        at_least(0, "optim.warmup_steps", self.warmup_steps)
        at_least(0, "optim.weight_decay", self.weight_decay)
        for i, beta in enumerate(self.betas):
            in_unit_interval(f"optim.betas[{i}]", beta)
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"optim.max_grad_norm must be positive, got {self.max_grad_norm}: inf never clips"
            )
        at_least(1, "optim.micro_batch_tokens", self.micro_batch_tokens)
        at_least(1, "optim.workspace_bytes", self.workspace_bytes)
        at_least(1, "optim.updates_per_rollout", self.updates_per_rollout)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """How a policy is measured during training."""

    data: DataConfig = field(default_factory=DataConfig)
    """Held-out problems; an empty path means no evaluation during training."""
    every: int = 0
    """Optimiser steps between evaluations; 0: none. The last step is evaluated too."""
    samples: int = 4
    """k of avg@k, pass@k and maj@k: completions per problem."""
    max_problems: int | None = None
    """Only the first so many problems; None: all."""

    def __post_init__(self) -> None:
        at_least(1, "eval.data.max_prompt_tokens", self.data.max_prompt_tokens)
        at_least(0, "eval.every", self.every)
        at_least(1, "eval.samples", self.samples)
        at_least(1, "eval.max_problems", self.max_problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is measured beside the training, and who is told. metrics.jsonl is always written."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Who else gets the rows of metrics.jsonl; each needs the extra of its name."""
    project: str = "kdrl"
    """Project of the run at wandb or trackio."""
    diagnostics_every: int = 0
    """Optimiser steps between measurements of the two gradients, of reward and of distillation:
    norms and cosine, from the step's first micro-batch, at two passes more over it. 0: never."""

    def __post_init__(self) -> None:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"log.trackers must name each tracker once, got {self.trackers}")
        at_least(0, "log.diagnostics_every", self.diagnostics_every)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run; saved as config.yaml in its folder."""

    out: Path = Path("runs/train")
    """Run folder: config.yaml, metrics.jsonl, samples/, checkpoints/, model/."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`; without it a used folder is refused."""
    seed: int = 0
    """All randomness is a function of (seed, step)."""
    steps: int = 280
    """Optimiser steps in all."""
    save_every: int = 50
    """Optimiser steps between checkpoints; the last step is always saved."""
    save_async: bool = False
    """Copy the state to CPU memory and write the checkpoint while the next step trains, instead of
    waiting for the disk. What fails is said after the step, and the run stops."""
    keep_checkpoints: int = 2
    """Older checkpoints beyond this many are deleted."""
    samples_per_step: int = 8
    """Completions written to samples/ at each step, with their prompts and rewards."""
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

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "keep_checkpoints"):
            at_least(1, name, getattr(self, name))
        for name in ("seed", "samples_per_step"):
            at_least(0, name, getattr(self, name))
        at_least(1, "data.max_prompt_tokens", self.data.max_prompt_tokens)
        if self.method.policy != "off" and self.sampling.group_size < 2:
            raise ValueError(
                "sampling.group_size must be at least 2 for a policy gradient, got "
                f"{self.sampling.group_size}: advantages compare completions of one prompt"
            )
        if self.method.kd_coef.kind == "reward_adaptive" and self.sampling.group_size < 2:
            raise ValueError(
                'sampling.group_size must be at least 2 for method.kd_coef.kind "reward_adaptive", '
                f"got {self.sampling.group_size}: a group of one is always decided"
            )
        if self.sampling.prompts_per_step % self.optim.updates_per_rollout:
            raise ValueError(
                "sampling.prompts_per_step must be a multiple of optim.updates_per_rollout, got "
                f"{self.sampling.prompts_per_step} and {self.optim.updates_per_rollout}"
            )
        for key, schedule in self.method.schedules.items():
            if schedule.waits_for_plateau and not (self.eval.every and self.eval.data.path):
                raise ValueError(
                    f"eval.every and eval.data.path must be set when {key} switches on a plateau, "
                    f"got {self.eval.every} and {self.eval.data.path!r}: set them, or "
                    f"{key}.patience to 0"
                )
        if self.model.teacher_is_url:
            self._check_server()

    def _check_server(self) -> None:
        """Raises ValueError for what log-probabilities from a server cannot give."""
        if self.method.kd in ("rkl", "fkl", "jsd") or self.method.kd_baseline:
            raise ValueError(
                'method.kd must be "k2" or "k3" with a teacher behind a URL, and kd_baseline None, '
                f'got "{self.method.kd}" and {self.method.kd_baseline}: a server scores sampled '
                "tokens only; set these, or load the teacher here (model.teacher: its folder)"
            )
        if self.model.teacher_api == "openai" and self.sampling.temperature != 1.0:
            raise ValueError(
                'sampling.temperature must be 1 with model.teacher_api "openai", got '
                f"{self.sampling.temperature}: such servers give prompt log-probabilities at 1, "
                "whatever is asked; serve the teacher with `python -m kdrl_train serve`"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """One measurement of a saved model: `python -m kdrl_train eval`."""

    out: Path | None = None
    """JSON file for the numbers; None: only the table on the screen."""
    seed: int = 0
    """Seed of the sampling."""
    samples: int = 4
    """k of avg@k, pass@k and maj@k: completions per problem."""
    max_problems: int | None = None
    """Only the first so many problems; None: all."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        at_least(0, "seed", self.seed)
        at_least(1, "samples", self.samples)
        at_least(1, "max_problems", self.max_problems)
        at_least(1, "data.max_prompt_tokens", self.data.max_prompt_tokens)
