"""Settings of the models of a run: policy and teacher."""

import re
from dataclasses import field, replace
from pathlib import Path
from typing import Literal

from kdrl_train.config.addresses import require_no_secret
from kdrl_train.settings import (
    NaturalInt,
    NaturalOrInf,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    Switch,
    settings,
)

SELF = "self"
"""As model.teacher: the policy's own weights."""

DEFAULT_TEACHER = "default"
"""The name of model.teacher beside those of model.teachers."""
REFERENCE = "reference"
"""Name of model.reference among the teachers."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")


@settings
class LoraConfig:
    """Adapters of low rank, which are trained in place of the policy's weights."""

    rank: NaturalInt = 0
    """Rank of the adapters (LoRA, needs peft: `pip install 'kdrl-kernels[lora]'`): each layer
    computes W x + scale · B A x, and A and B, of this rank, are trained alone. W is frozen in
    model.dtype; A, B and their moments are float32. Learning rates are 10 to 100 times those of all
    weights. 0: train all weights."""
    alpha: PositiveFloat = 32.0
    """scale is alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Which layers are adapted, by the last part of their names (q_proj v_proj lm_head);
    all-linear: every linear layer but the LM head. Experts that are kept in one tensor are not."""
    rslora: Switch = False
    """scale is alpha / sqrt(rank)."""
    merge: Switch = True
    """At the end write model/, with the adapters merged into the weights, beside adapter/. Engines
    other than `generate` in one process sample from merged weights in any case."""

    def __post_init__(self) -> None:
        if self.rank == 0 and (self.alpha, self.targets, self.rslora, self.merge) != (
            32.0,
            ("all-linear",),
            False,
            True,
        ):
            raise ValueError(
                "rank must be at least 1 with other settings of model.lora, got 0: set it, or "
                "leave them out to train all weights"
            )
        if not self.targets:
            raise ValueError('targets must name a layer, got none: set it, e.g. to "all-linear"')


@settings
class ModelConfig:
    """Which models run, and in which precision."""

    policy: str = ""
    """The policy (student): a folder or hub id. Any causal LM of transformers is accepted."""
    teacher: str | None = None
    """The teacher: a folder, a hub id, a server's URL, or self, the policy's own weights
    (self_teacher; ./self is a folder). A URL is http://host:port. The teacher must have the
    policy's tokenizer. Needed when method.kd is set. `eval` reads only the size of
    its vocabulary: training never samples a token that the teacher does not have."""
    self_teacher: Literal["frozen", "live", "ema"] = "frozen"
    """Which weights of the policy teach, with teacher self. frozen: those of step 0, a copy; with
    model.lora the policy without its adapters, and no copy. live: those that are trained, without a
    copy and without a gradient; each update reads them as they are. ema: a float32 copy that
    follows them after each optimiser step (ema_decay)."""
    ema_decay: OpenUnitInterval = 0.99
    """With self_teacher ema: the share of itself that the copy keeps at each optimiser step; the
    rest comes from the policy."""
    teachers: dict[str, str] = field(default_factory=dict, hash=False)
    """More teachers by name, for problems that data.teacher_column routes to them: {math: folder,
    code: URL}. Each is a folder, a hub id or a URL, as `teacher`, which stays the teacher of the
    problems that name none."""
    reference: str | None = None
    """The model that method.extrapolation starts from: a folder or hub id, often what the teacher
    was trained from, or self, the policy at step 0 (with model.lora without a copy)."""
    move_teachers: Switch = False
    """Keep the teachers of this process in CPU memory, and on the GPU only the one that is reading:
    a step moves each of them once. Not under torchrun, where offload_teacher does as much."""
    teacher_api: Literal["kdrl", "openai"] = "kdrl"
    """The protocol of a teacher behind a URL: kdrl (`python -m kdrl_train serve`) or openai (vLLM,
    or another server whose /v1/completions returns prompt log-probabilities; for exact divergences
    a vLLM whose /pooling returns hidden states)."""
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
    """Checkpoint folder (runs/x/checkpoints/step_000050), or the best.json of a run, whose weights
    replace those of `policy` at step 0. Nothing else is read from it. It must come from a run with
    the same architecture."""
    trust_remote_code: Switch = False
    """Run Python files in the folders of policy and teacher (auto_map in their config.json), with
    the rights of this process. Set it only for authors that you trust."""
    head_backward: Literal["exact", "sketch"] = "exact"
    """Gradient of the LM head. sketch: an unbiased sparse one, without the two GEMMs of dX and dW;
    sketch_noise in the log is its relative error."""
    head_threshold: PositiveFloat | None = None
    """With a sketched head: the probability from which an entry is kept exactly, in [2^-24, 1];
    null: 1e-4, or 5e-4 where model.dtype has 16 bits; at least 2 / vocabulary."""
    head_flat: NaturalOrInf = 1.0
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
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        require_no_secret("teacher", self.teacher, "KDRL_TEACHER_TOKEN")
        self._check_self_teacher()
        for name, place in self.teachers.items():
            _check_name(name, place)
        if self.head_threshold is not None and not 2.0**-24 <= self.head_threshold <= 1:
            raise ValueError(f"head_threshold must be in [2^-24, 1], got {self.head_threshold}")
        for name in ("liger", "offload_policy", "offload_teacher"):
            if self.tensor_parallel > 1 and getattr(self, name):
                raise ValueError(
                    f"{name} must be off where model.tensor_parallel is more than 1, got "
                    f"{self.tensor_parallel}: together they are not supported yet"
                )
        if self.tensor_parallel > 1 and self.lora.rank:
            raise ValueError(
                f"tensor_parallel must be 1 with model.lora, got {self.tensor_parallel}: adapters "
                "are not split over ranks; torchrun's ranks share the tokens (FSDP2)"
            )

    def _check_self_teacher(self) -> None:
        """Raises ValueError for settings of a self-teacher that would be ignored, or that adapters
        do not have."""
        if self.self_teacher == "ema" and self.lora.rank:
            raise ValueError(
                'self_teacher must be "frozen" or "live" with model.lora, got "ema": a mean of A '
                "and of B is not that of B A"
            )
        frozen = self.teacher_is_self and self.self_teacher == "frozen"
        if frozen and self.lora.rank and self.weights is not None:
            raise ValueError(
                f"weights must not be set with a frozen self-teacher and model.lora, got "
                f"{self.weights}: name the adapter/ that its run exported as model.policy"
            )
        if self.self_teacher != "frozen" and not self.teacher_is_self:
            raise ValueError(
                f'teacher must be self with self_teacher "{self.self_teacher}", got {self.teacher}'
            )
        if self.self_teacher != "frozen" and self.move_teachers:
            raise ValueError(
                f'move_teachers must be off with self_teacher "{self.self_teacher}", got on: its '
                "weights change"
            )
        if self.ema_decay != 0.99 and self.self_teacher != "ema":
            raise ValueError(
                f'self_teacher must be "ema" with ema_decay {self.ema_decay:g}, got '
                f'"{self.self_teacher}": set it, or leave ema_decay out'
            )
        if self.self_teacher == "live" and self.offload_teacher:
            raise ValueError(
                'offload_teacher must be off with self_teacher "live", got on: there is no copy of '
                "the weights; model.offload_policy keeps the policy's in CPU memory"
            )

    @property
    def teacher_is_self(self) -> bool:
        """Whether the policy's own weights teach."""
        return self.teacher == SELF

    @property
    def teacher_is_url(self) -> bool:
        """Whether the teacher runs in a server, and not in this process."""
        return is_url(self.teacher)

    @property
    def teacher_places(self) -> dict[str, str]:
        """Name of each teacher -> its folder, hub id or URL; DEFAULT_TEACHER first, if it is set,
        and REFERENCE, which teaches no problem, last.

        A teacher's number is its place in this order.
        """
        default = {} if self.teacher is None else {DEFAULT_TEACHER: self.teacher}
        reference = {} if self.reference is None else {REFERENCE: self.reference}
        return default | self.teachers | reference

    @property
    def teacher_servers(self) -> list[str]:
        """The names of the teachers behind URLs."""
        return [name for name, place in self.teacher_places.items() if is_url(place)]

    def teacher_key(self, name: str) -> str:
        """Return the key of the setting that names a teacher, for messages."""
        keys = {DEFAULT_TEACHER: "model.teacher", REFERENCE: "model.reference"}
        return keys.get(name, f"model.teachers.{name}")


POLICY_FILE = "policy.json"
"""The file of a run folder that describes the policy besides its weights."""
BASE_FILE = "base.json"
"""The file of a run folder with the name of the base of its adapters and a hash of its weights."""


def teacher_file(name: str = DEFAULT_TEACHER) -> str:
    """Return the name of the file of a run folder that describes a teacher."""
    return "teacher.json" if name == DEFAULT_TEACHER else f"teacher_{name}.json"


def is_url(place: str | None) -> bool:
    """Whether a teacher is behind a URL, and not in this process."""
    return place is not None and place.startswith(("http://", "https://"))


def _check_name(name: str, place: str) -> None:
    """Raise ValueError for a teacher whose name or place cannot be used.

    The name becomes part of the keys of metrics and of file names.
    """
    if not _NAME.fullmatch(name) or name in (DEFAULT_TEACHER, REFERENCE):
        raise ValueError(
            "teachers must have names of letters, digits, _ and -, at most 40, and not "
            f'"{DEFAULT_TEACHER}" nor "{REFERENCE}", got {name!r}: these are model.teacher and '
            "model.reference"
        )
    if place == SELF:
        raise ValueError(
            f"teachers.{name} must be another model, got {SELF}: only model.teacher can be the "
            "policy itself"
        )
    if not place.strip():
        raise ValueError(f"teachers.{name} must be a folder, a hub id or a URL, got {place!r}")
    require_no_secret(f"teachers.{name}", place, "KDRL_TEACHER_TOKEN")


@settings
class TeacherConfig:
    """How a teacher behind a URL is queried, and its head. Results do not depend on it."""

    head: str | None = None
    """Folder or hub id of the model that the server at model.teacher has; its LM head alone is read
    (by `check` also the final norm, with vLLM). With it method.kd may be an exact divergence (rkl,
    fkl, jsd, rkl+fkl) and kd_baseline kl: the server sends its hidden states."""
    heads: dict[str, str] = field(default_factory=dict, hash=False)
    """Of model.teachers behind URLs: name -> what `head` is for model.teacher: {code: folder}."""
    name: str | None = None
    """Name of the model, if an openai server has several; None: its only one."""
    names: dict[str, str] = field(default_factory=dict, hash=False)
    """Of model.teachers behind URLs: name -> what `name` is for model.teacher."""
    concurrency: PositiveInt = 64
    """Largest number of completions that wait for the server's reply at the same time."""
    timeout_s: PositiveFloat = 120.0
    """Deadline of one request, in seconds. After it the request is sent again."""
    deadline_s: PositiveFloat = 1800.0
    """Seconds without any reply after which the run saves a checkpoint and stops. Until then it
    waits, and continues when the teacher is back."""

    def of(self, teacher: str) -> "TeacherConfig":
        """Return the settings of one teacher: its head and its name in place of those of all."""
        if teacher == DEFAULT_TEACHER:
            return replace(self, heads={}, names={})
        head, name = self.heads.get(teacher), self.names.get(teacher)
        return replace(self, head=head, name=name, heads={}, names={})

    @staticmethod
    def head_key(teacher: str) -> str:
        """Return the key of the setting that names a teacher's head, for messages."""
        return "teacher.head" if teacher == DEFAULT_TEACHER else f"teacher.heads.{teacher}"

    @staticmethod
    def name_key(teacher: str) -> str:
        """Return the key of the setting that names a teacher's model on its server."""
        return "teacher.name" if teacher == DEFAULT_TEACHER else f"teacher.names.{teacher}"
