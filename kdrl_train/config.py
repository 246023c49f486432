"""The run configuration: every number that changes a run, with its unit."""

from dataclasses import field
from pathlib import Path
from typing import Literal

from kdrl_train.method.config import MethodConfig
from kdrl_train.settings import (
    Finite,
    LearningRate,
    NaturalFloat,
    NaturalInt,
    NaturalOrInf,
    PositiveFloat,
    PositiveInt,
    PositiveOrInf,
    Share,
    Switch,
    SwitchOrAuto,
    UnitInterval,
    settings,
)
from kdrl_train.watch import RanksConfig


def _require_no_secret(key: str, address: str | None, variable: str) -> None:
    """Raise ValueError for a server's address that may hold a secret, as settings are written down.

    The message does not repeat the address.
    """
    if address is not None and "://" in address and set(address) & set("@?#"):
        raise ValueError(
            f"{key} must be http://host:port without a user, password or query, got one of @ ? #: "
            f"put the server's token into the environment variable {variable}"
        )


@settings
class ModelConfig:
    """Which models run, and in which precision."""

    policy: str = ""
    """The policy (student): a folder or hub id. Any causal LM of transformers is accepted."""
    teacher: str | None = None
    """The teacher: a folder, a hub id or a server's URL. A URL is http://host:port. The teacher
    must have the policy's tokenizer. Needed when method.kd is set. `eval` reads only the size of
    its vocabulary: training never samples a token that the teacher does not have."""
    teacher_api: Literal["kdrl", "openai"] = "kdrl"
    """The protocol of a teacher behind a URL: kdrl (`python -m kdrl_train serve`) or openai (vLLM,
    or another server whose /v1/completions returns prompt log-probabilities)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the models. It holds for the forward pass, the backward pass and the teacher.
    The policy's weights and AdamW's moments are always float32: at a learning rate of 1e-6 a
    bfloat16 weight would not change."""
    device: str = "auto"
    """Torch device of the run; auto: cuda if there is a GPU, else cpu."""
    attention: str | None = None
    """Name of the attention implementation in transformers. None: flash_attention_2 on a GPU in
    bfloat16 if flash-attn is installed, else our own `packed`, which computes no attention between
    sequences that share a packed row; the model's own (sdpa or eager), if need be with one sequence
    a row, where these would compute something else. `check` says which was chosen, and why."""
    gradient_checkpointing: Switch = False
    """Compute activations again in the backward pass: less memory, about a third more compute."""
    offload_policy: Switch = False
    """Keep the policy's shards, gradients and AdamW moments in CPU memory (torchrun, GPUs)."""
    offload_teacher: Switch = False
    """Keep the teacher's shards in CPU memory (torchrun, GPUs)."""
    weights: Path | None = None
    """Checkpoint folder (runs/x/checkpoints/step_000050) whose weights replace those of `policy` at
    step 0. Nothing else is read from it. It must come from a run with the same architecture."""
    trust_remote_code: Switch = False
    """Run Python files in the folders of policy and teacher (auto_map in their config.json), with
    the rights of this process. Set it only for authors that you trust."""
    head_backward: Literal["exact", "sketch"] = "exact"
    """Gradient of the LM head. sketch: an unbiased sparse one, without the two GEMMs of dX and dW;
    sketch_noise in the log is its relative error."""
    head_threshold: PositiveFloat = 2.0**-11
    """With a sketched head: the probability from which an entry is kept exactly, in [2^-24, 1]."""
    head_flat: NaturalOrInf = 0.5
    """With a sketched head: a token whose entries would cost more than this share of its part of
    the GEMMs gets its exact gradient. At a small vocabulary these are nearly all tokens. inf: no
    token."""
    tensor_parallel: PositiveInt = 1
    """Number of neighbouring ranks (of torchrun) that split every layer and the LM head among
    them. It must divide the number of ranks and that of key-value heads. Such groups of ranks share
    the tokens of a step, as single ranks do at 1, where FSDP2 alone shards the models. For dense
    models like Llama and Qwen3."""
    liger: Switch = False
    """Use liger-kernel for RMSNorm, SwiGLU and RoPE of both models. Needs a GPU with Triton, and
    `pip install 'kdrl-kernels[liger]'`."""

    def __post_init__(self) -> None:
        _require_no_secret("teacher", self.teacher, "KDRL_TEACHER_TOKEN")
        if not 2.0**-24 <= self.head_threshold <= 1:
            raise ValueError(f"head_threshold must be in [2^-24, 1], got {self.head_threshold}")
        for name in ("liger", "offload_policy", "offload_teacher"):
            if self.tensor_parallel > 1 and getattr(self, name):
                raise ValueError(
                    f"{name} must be off where model.tensor_parallel is more than 1, got "
                    f"{self.tensor_parallel}: together they are not supported yet"
                )

    @property
    def teacher_is_url(self) -> bool:
        """Whether the teacher runs in a server, and not in this process."""
        return self.teacher is not None and self.teacher.startswith(("http://", "https://"))


@settings
class TeacherConfig:
    """How a teacher behind a URL is queried. Results do not depend on it."""

    name: str | None = None
    """Name of the model, if an openai server has several; None: its only one."""
    concurrency: PositiveInt = 64
    """Largest number of completions that wait for the server's reply at the same time."""
    timeout_s: PositiveFloat = 120.0
    """Deadline of one request, in seconds. After it the request is sent again."""
    deadline_s: PositiveFloat = 1800.0
    """Seconds without any reply after which the run saves a checkpoint and stops. Until then it
    waits, and continues when the teacher is back."""


@settings
class DataConfig:
    """Where prompts and gold answers come from."""

    path: str = ""
    """A .jsonl or .parquet file, a folder, or a hub id."""
    split: str = "train"
    """Split to read, for hub ids and folders that have several."""
    prompt_column: str = "question"
    """Column with the text of the problem."""
    answer_column: str = "answer"
    """Column with the gold answer. If the text has `####`, the answer is what follows
    (GSM8K); if it has one `\\boxed{}`, what that holds (MATH)."""
    prompt_template: str = "{prompt}"
    """Text around each problem; {prompt} stands for the problem."""
    chat_template: Switch = True
    """Apply the tokenizer's chat template if it has one. Otherwise the text is used as it is."""
    system_prompt: str | None = None
    """System message, used when a chat template is applied."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest prompt, in tokens. Problems with a longer one are left out and counted; where these
    are more than half, the run is refused before it starts."""


@settings
class SamplingConfig:
    """How completions are sampled: from the policy's own distribution, with no top-k or top-p."""

    prompts_per_step: PositiveInt = 64
    """P: prompts per optimiser step."""
    group_size: PositiveInt = 8
    """G: completions per prompt. Advantages are centred inside a group."""
    max_new_tokens: PositiveInt = 1024
    """Longest completion, in tokens. A longer one is cut, and rewarded as it stands; the number of
    cut completions is logged."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. Log-probabilities and the loss, the teacher's part included, use the
    same temperature."""
    batch_size: PositiveInt = 256
    """Completions that are generated together. It limits the memory of the key-value cache."""


@settings
class EngineConfig:
    """Which engine samples the completions."""

    kind: Literal["generate", "continuous", "vllm", "vllm_server"] = "generate"
    """Sampling engine. generate: transformers' generate, on the policy itself, or on a whole copy
    on each rank under torchrun. continuous: transformers' continuous batching, always on a copy,
    for GPUs. vllm: vLLM in this process, with a copy on each rank. vllm_server: one vLLM server
    that all ranks share."""
    url: str | None = None
    """Address of the vllm_server: http://host:port. It must be able to read the run's folder,
    because it gets the weights through it."""
    timeout_s: PositiveFloat = 1800.0
    """Longest wait for one reply of the vllm_server, and for a server that is away, in seconds.
    After it the run stops."""
    memory_share: Share = 0.4
    """Share of the GPU's memory (on a CPU: of the machine's) that vllm takes for its copy of the
    policy and its key-value cache."""
    eager: Switch = False
    """Run vllm without CUDA graphs: it starts sooner, takes less memory, and samples slower."""
    max_sampler_mismatch: PositiveFloat | None = None
    """Largest allowed sampler mismatch, in nats: the mean difference between the log-probabilities
    of engine and trainer, over the tokens of a step. Above it the run stops. None: 1e-3 in float32,
    0.05 in bfloat16."""
    staleness: Literal[0, 1] = 0
    """Optimiser steps between sampling and learning: 0 or 1. 1: while a step trains, a copy of the
    weights that it started from samples the completions of the next step, and they are verified.
    They are then off-policy by one step: the ratio is taken to the policy that sampled them, or,
    with method.sampler_correction, to the policy at the start of the step."""

    def __post_init__(self) -> None:
        _require_no_secret("url", self.url, "VLLM_API_KEY")
        if (self.url is not None) != (self.kind == "vllm_server"):
            raise ValueError(
                'url must be set for kind "vllm_server", and for no other kind, got '
                f'{self.url} and "{self.kind}"'
            )

    def allowed_mismatch(self, dtype: str) -> float:
        """The largest sampler mismatch for a model.dtype, in nats."""
        return self.max_sampler_mismatch or {"float32": 1e-3, "bfloat16": 0.05}[dtype]


@settings
class RewardConfig:
    """How a completion becomes a number."""

    function: str = "math"
    """math, exact, or your module:function. math: the last boxed or stated answer must equal
    the gold answer as mathematics.
    exact: the answer must be the gold answer, character by character."""
    timeout_s: PositiveFloat = 5.0
    """Deadline for one completion, in seconds. After it the completion counts as wrong, and as a
    timeout."""
    workers: PositiveInt = 2
    """Processes that compute rewards."""
    memory_bytes: PositiveInt = 8 * 2**30
    """Memory that one of them may allocate, in bytes, on Linux; elsewhere there is no limit. A
    completion that needs more counts as an error."""
    right_above: Finite = 0.5
    """A completion is right if its reward is above this: half of the largest reward, which is 1
    for math and exact. Masks, schedules and shares of right completions count by it. A function of
    your own that returns (reward, right) decides by itself."""


@settings
class OptimConfig:
    """AdamW, and how completions are packed for it."""

    learning_rate: LearningRate = 1e-6
    """Peak learning rate of AdamW."""
    warmup_steps: NaturalInt = 0
    """Optimiser steps in which the learning rate rises linearly from 0."""
    weight_decay: NaturalFloat = 0.0
    """Decoupled weight decay of AdamW."""
    betas: tuple[UnitInterval, UnitInterval] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    max_grad_norm: PositiveOrInf = 1.0
    """Largest norm of the gradient: a larger gradient is scaled down to it. inf: never."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens packed into one forward and backward pass. Results do not depend on it."""
    workspace_bytes: PositiveInt | None = None
    """Memory of the one-pass head, in bytes, without its inputs, outputs and gradients; None: the
    kernel's default."""
    head_impl: Literal["triton", "torch", "reference"] | None = None
    """Implementation of the one-pass head; None: triton on a GPU, torch elsewhere."""
    updates_per_rollout: PositiveInt = 1
    """Optimiser updates in one step. The step's prompts are split into this many equal parts, and
    each part makes one update; each completion is used once. Above 1 the later updates are
    off-policy: the ratio is taken to the policy before the first update, which costs one more
    forward pass."""


@settings
class EvalConfig:
    """How the policy is measured during training."""

    data: DataConfig = field(default_factory=DataConfig)
    """Held-out problems; with an empty path nothing is measured during training."""
    every: NaturalInt = 0
    """Optimiser steps between evaluations; 0: none. The last step is evaluated too."""
    samples: PositiveInt = 4
    """k of avg@k, pass@k and maj@k: completions per problem."""
    max_problems: PositiveInt | None = None
    """Use only this many problems, the first ones; None: all."""


@settings
class LogConfig:
    """What is logged besides metrics.jsonl, which every run writes."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go too: tensorboard, wandb, trackio. Each needs the extra of its name."""
    project: str = "kdrl"
    """Name of the project at wandb or trackio."""
    diagnostics_every: NaturalInt = 0
    """Optimiser steps between two measurements of the reward's gradient and the distillation's
    gradient: their norms and their cosine, on the step's first micro-batch. A measurement costs two
    more passes over it. 0: never."""

    def __post_init__(self) -> None:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers must name each tracker once, got {self.trackers}")


@settings
class TrainConfig:
    """One training run; saved as config.yaml in its folder."""

    out: Path = Path("runs/train")
    """Run folder. It gets config.yaml, metrics.jsonl, samples/, checkpoints/ and model/."""
    resume: SwitchOrAuto = False
    """Continue from the newest checkpoint in `out`; auto: if it holds a run, else start. Without
    this a used folder is refused. A scheduler that runs the same command again needs auto."""
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
        if self.method.policy != "off" and self.sampling.group_size < 2:
            raise ValueError(
                "sampling.group_size must be at least 2 for a policy gradient, got "
                f"{self.sampling.group_size}: advantages compare completions of one prompt"
            )
        if self.method.kd_coef.kind == "reward_adaptive" and self.sampling.group_size < 2:
            raise ValueError(
                'sampling.group_size must be at least 2 for method.kd_coef.kind "reward_adaptive", '
                f"got {self.sampling.group_size}: with one completion beta would always be 0"
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
        for key, schedule in self.method.schedules.items():
            if schedule.waits_for_plateau and not (self.eval.every and self.eval.data.path):
                raise ValueError(
                    f"eval.every and eval.data.path must be set when {key} switches on a plateau, "
                    f"got {self.eval.every} and {self.eval.data.path!r}: set them, or "
                    f"{key}.patience to 0"
                )
        if self.model.teacher_is_url:
            self._check_server()

    def is_saved(self, done: int) -> bool:
        """Whether a checkpoint follows on `done` optimiser steps."""
        kept = self.keep_every > 0 and done % self.keep_every == 0
        return done % self.save_every == 0 or kept or done == self.steps

    def _check_server(self) -> None:
        """Raises ValueError for what log-probabilities from a server cannot give."""
        if self.method.kd in ("rkl", "fkl", "jsd", "rkl+fkl") or self.method.kd_baseline:
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
    max_problems: PositiveInt | None = None
    """Use only this many problems, the first ones; None: all."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
