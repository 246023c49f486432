"""Settings of problems, sampling and rewards."""

import json
import re
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from kdrl_train.config.addresses import require_no_secret
from kdrl_train.config_file import read_mapping
from kdrl_train.settings import (
    Finite,
    NaturalFloat,
    NaturalInt,
    PositiveFloat,
    PositiveInt,
    Share,
    Switch,
    settings,
)

OVERLONG = "overlong"
"""Name of the fine for length among a completion's rewards."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")

RESERVED = (
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "processor_kwargs", "load_audio_from_video", "kwargs", "self",
)  # fmt: skip
"""Names that apply_chat_template of transformers takes for itself."""


@settings
class DataConfig:
    """Where prompts and gold answers come from."""

    path: str = ""
    """A .jsonl, .json, .csv or .parquet file, a folder, or a hub id."""
    split: str = "train"
    """Split to read, for hub ids and folders that have several."""
    prompt_column: str = "question"
    """Column with the text of the problem, or with its chat messages, which the chat template is
    applied to as they are. Dots lead into nested columns: extra_info.question."""
    answer_column: str = "answer"
    """Column with the gold answer, as reward_model.ground_truth. If the text has `####`, the answer
    is what follows (GSM8K); if it has one `\\boxed{}`, what that holds (MATH)."""
    teacher_column: str | None = None
    """Column with the name of the problem's teacher, one of model.teachers. Where it is missing or
    empty, model.teacher is the teacher. Evaluation reads no teacher."""
    prompt_template: str = "{prompt}"
    """Text around each problem; {prompt} stands for the problem. Of chat messages it is the last
    one that it is put around."""
    chat_template: Switch = True
    """Apply the tokenizer's chat template if it has one. Otherwise the text is used as it is."""
    system_prompt: str | None = None
    """System message, used when a chat template is applied. Chat messages must not have their own
    then."""
    template_arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    """Values that the chat template reads by their names, as {enable_thinking: false}. `check`
    warns of a template that does not read them."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest prompt, in tokens. Problems with a longer one are left out and counted; where these
    are more than half, the run is refused before it starts."""
    teacher_template: str | None = None
    """What the teacher reads before a completion, in place of the policy's prompt: {prompt} is the
    problem, {answer} the gold answer, {solution} the column of that name or else the whole text of
    answer_column, and {name} any other column; {{name}} stays a name in braces. None: it reads the
    policy's prompt."""
    max_teacher_prompt_tokens: PositiveInt = 4096
    """Longest prompt of the teacher, in tokens, with a teacher_template. Problems with a longer one
    are left out and counted, as with max_prompt_tokens."""

    def __post_init__(self) -> None:
        template = self.teacher_template  # of which {{prompt}} stays a name in braces
        if template is not None and "{prompt}" not in template.replace("{{prompt}}", ""):
            raise ValueError(
                "teacher_template must contain {prompt}, where the problem goes, got "
                f"{template!r}"
            )
        for name, value in self.template_arguments.items():
            if name in RESERVED or not name.isidentifier():
                raise ValueError(
                    "template_arguments must be names that the chat template reads, got "
                    f"{name!r}, which is an argument of apply_chat_template or no name: leave it "
                    "out"
                )
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:  # a date of YAML; nan
                raise ValueError(
                    f"template_arguments.{name} must be a value of JSON, got {value!r}: {error}"
                ) from error
        if self.template_arguments and not self.chat_template:
            raise ValueError(
                "template_arguments must be empty without chat_template, got "
                f"{self.template_arguments}: nothing would read them"
            )


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
        require_no_secret("url", self.url, "VLLM_API_KEY")
        if (self.url is not None) != (self.kind == "vllm_server"):
            raise ValueError(
                'url must be set for kind "vllm_server", and for no other kind, got '
                f'{self.url} and "{self.kind}"'
            )

    def allowed_mismatch(self, dtype: str) -> float:
        """The largest sampler mismatch for a model.dtype, in nats."""
        return self.max_sampler_mismatch or {"float32": 1e-3, "bfloat16": 0.05}[dtype]


@settings
class RewardPart:
    """One of several rewards, whose weighted sum is the reward."""

    function: str
    """math, exact, or your module:function."""
    weight: Finite = 1.0
    """Factor of its values in the sum; 0: it is only measured."""
    name: str = ""
    """Its name in metrics.jsonl and samples/; empty: that of its function, without the module."""
    decides: Switch = False
    """Whether this one says which completions are right; where none is marked, the first does."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.label) or self.label == OVERLONG:
            raise ValueError(
                f"name must be 1 to 40 letters, digits, _, . or -, and not {OVERLONG}, got "
                f"{self.label[:80]!r} of {self.function[:80]}: set name"
            )

    @property
    def label(self) -> str:
        """Its name in metrics and samples."""
        return self.name or self.function.rpartition(":")[2]


def _reward_part(value: Any) -> Any:
    """Read a reward that is written as text: a function's name, or keys and values in braces."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("{"):
        return {"function": value}
    try:
        return read_mapping(value)
    except ValueError as error:
        raise ValueError(
            "function must be a name, or stand among keys and values such as {function: math, "
            f"weight: 0.5}}, got {value[:80]!r}: {error}"
        ) from error


@settings
class RewardConfig:
    """How a completion becomes a number."""

    function: str = "math"
    """math, exact, or your module:function. math: the last boxed or stated answer must equal
    the gold answer as mathematics.
    exact: the answer must be the gold answer, character by character."""
    functions: tuple[Annotated[RewardPart, BeforeValidator(_reward_part)], ...] = ()
    """Several rewards in place of function; the reward is their weighted sum. Each is a function's
    name, or keys and values: {function: my:format, weight: 0.1, name: format, decides: false}."""
    timeout_s: PositiveFloat = 5.0
    """Deadline for one completion, in seconds, with all its rewards. After it the completion counts
    as wrong, and as a timeout."""
    workers: PositiveInt = 2
    """Processes that compute rewards."""
    memory_bytes: PositiveInt = 8 * 2**30
    """Memory that one of them may allocate, in bytes, on Linux; elsewhere there is no limit. A
    completion that needs more counts as an error."""
    right_above: Finite = 0.5
    """A completion is right if its reward is above this: half of the largest reward, which is 1
    for math and exact. Masks, schedules and shares of right completions count by it. A function of
    your own that returns (reward, right) decides by itself. Of several rewards only the one that
    decides counts, without its weight."""
    overlong_buffer: NaturalInt = 0
    """Tokens before sampling.max_new_tokens from which on a completion is fined for its length,
    linearly up to overlong_penalty (DAPO); 0: none is. What is right does not depend on it."""
    overlong_penalty: NaturalFloat = 1.0
    """What a completion of sampling.max_new_tokens loses of its reward, where overlong_buffer is
    set."""

    def __post_init__(self) -> None:
        if self.functions and self.function != "math":
            raise ValueError(
                f"function must be left out where functions are set, got {self.function}: list it "
                "among them"
            )
        if self.overlong_penalty != 1 and not self.overlong_buffer:
            raise ValueError(
                "overlong_buffer must be at least 1 with overlong_penalty "
                f"{self.overlong_penalty:g}, got 0: no completion would be fined; set it, or leave "
                "overlong_penalty out"
            )
        names = [part.label for part in self.functions]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"functions must have different names, got {twice} twice: set name")
        if sum(part.decides for part in self.functions) > 1:
            deciding = [part.label for part in self.functions if part.decides]
            raise ValueError(
                f"functions must have one that decides, got {', '.join(deciding)}: mark one of them"
            )

    @property
    def parts(self) -> tuple[RewardPart, ...]:
        """The rewards that are added up; one where `functions` is empty."""
        if self.functions:
            return self.functions
        name = self.function.rpartition(":")[2]
        name = name if _NAME.fullmatch(name) and name != OVERLONG else "reward"
        return (RewardPart(function=self.function, name=name),)

    @property
    def deciding(self) -> RewardPart:
        """The reward that says which completions are right."""
        return next((part for part in self.parts if part.decides), self.parts[0])

    @property
    def builtin(self) -> bool:
        """Whether none of the rewards is a function of the user's own."""
        return all(part.function in ("math", "exact") for part in self.parts)
