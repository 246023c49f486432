"""Trains a small policy with TRL's trainer or ours, on one process or several.

Rollouts are scripted: TRL samples other tokens on each process.
"""

import os
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from numpy.typing import NDArray
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from kdrl_kernels.integrations.trl import (
    KdrlConfig,
    KdrlDistillationConfig,
    KdrlDistillationTrainer,
    KdrlTrainer,
)
from tests.integrations.trl_runs import (
    arguments,
    logs,
    prompts,
    small_model,
    tokenizer,
    trainer_of,
)
from tests.train.ranks import on_processes

LONGEST = 8
"""Tokens of the longest completion."""


@dataclass(frozen=True, kw_only=True)
class TrlRun:
    """Describes one training run, of `batch` completions a micro-batch over all processes."""

    folder: Path
    kdrl: bool = True
    """Whether the trainer is ours."""
    distil: bool = False
    """Whether it distils alone, on the same completions."""
    batch: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    """Of the trainer's configuration."""
    teacher: bool | str = False
    """Whether there is a teacher, or the URL of its server."""
    lora: dict[str, Any] | None = None
    fsdp: bool = False
    tied: bool = False
    sampled: bool = False
    """Whether TRL samples the completions: others with another number of processes."""
    tool_mask: bool = False
    masked_from: int | None = None
    """First completion of a batch whose tokens are all a tool's."""
    sampler_ratio: bool = False
    """Whether the sampler's log-probabilities differ from the policy's, as vLLM's do."""


@dataclass(frozen=True)
class TrlOutcome:
    """Holds what a run left: what it logged, and its trained parameters, whole."""

    log: list[dict[str, float]]
    parameters: dict[str, NDArray[Any]]
    sharded: bool
    """Whether a process held a part of each parameter."""


def train_ranks(run: TrlRun, ranks: int = 2) -> TrlOutcome:
    """Train on several processes; return what the first one says."""
    outcomes = on_processes(ranks, partial(_train, run))
    assert all(isinstance(outcome, TrlOutcome) for outcome in outcomes), "\n".join(
        str(outcome) for outcome in outcomes if not isinstance(outcome, TrlOutcome)
    )
    return outcomes[0]


def _train(run: TrlRun, rank: int) -> TrlOutcome | str:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        trainer = make_trainer(run, int(os.environ["WORLD_SIZE"]))
        trainer.train()
        sharded = all(isinstance(value, DTensor) for value in trainer.model.parameters())
        return TrlOutcome(logs(trainer), trained(trainer), sharded)
    except Exception:
        return f"rank {rank}: {traceback.format_exc()}"


def make_trainer(run: TrlRun, ranks: int = 1) -> Any:
    """Make the trainer of one process of a run."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func
    options = {
        "per_device_train_batch_size": run.batch // ranks,
        "max_completion_length": LONGEST,
    }
    if run.fsdp:
        options |= {"fsdp": True, "fsdp_config": {"version": 2}}
    if run.distil:
        return _distiller(run, options)
    more: dict[str, Any] = {"model": small_model(1, tied=run.tied)}
    micro_batches = run.options.get("gradient_accumulation_steps", 1)
    more["train_dataset"] = prompts(max(4, micro_batches * run.batch // 4))  # one step's, or more
    if not run.sampled:
        more["rollout_func"] = partial(rollouts, run)
    if run.lora is not None:
        more["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **run.lora)
    if run.kdrl and not run.teacher:
        options["kd"] = None
    if run.teacher:
        url = run.teacher if isinstance(run.teacher, str) else None
        more["teacher_model"] = url or small_model(2, hidden=48)
    args = arguments(KdrlConfig if run.kdrl else GRPOConfig, run.folder, **options | run.options)
    _shard_on_a_cpu(run)
    trainer = trainer_of(KdrlTrainer if run.kdrl else GRPOTrainer, args, **more)
    if run.sampler_ratio:
        trainer.use_vllm = True
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        trainer._last_loaded_step = -1
    return trainer


def _shard_on_a_cpu(run: TrlRun) -> None:
    """Let accelerate shard, which has no such choice for a CPU; torch does it there as on GPUs."""
    if run.fsdp:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _distiller(run: TrlRun, options: dict[str, Any]) -> Any:
    """Make a trainer that distils, with or without ours."""
    kind = KdrlDistillationConfig if run.kdrl else DistillationConfig
    args = arguments(kind, run.folder, **options | run.options)
    _shard_on_a_cpu(run)
    trainer = (KdrlDistillationTrainer if run.kdrl else DistillationTrainer)(
        small_model(1),
        small_model(2, hidden=48),
        args,
        train_dataset=prompts(16),
        processing_class=tokenizer(),
    )

    def generate(texts: list[str]) -> tuple[Any, ...]:
        rows = rollouts(run, texts, trainer)
        return rows["prompt_ids"], rows["completion_ids"], rows.get("env_mask"), None, []

    trainer._generate = generate
    return trainer


def rollouts(run: TrlRun, texts: list[str], trainer: Any) -> dict[str, Any]:
    """Return completions that depend on the step and the place in its whole batch, for TRL."""
    first = trainer.accelerator.process_index * len(texts)
    completions, logprobs, masks = [], [], []
    for place in range(first, first + len(texts)):
        rng = torch.Generator().manual_seed(1000 * trainer.state.global_step + place)
        length = int(torch.randint(1, LONGEST + 1, (1,), generator=rng))
        ids = torch.randint(3, len(tokenizer()), (length,), generator=rng)
        if place % 3:
            ids[-1] = tokenizer().eos_token_id
        completions.append(ids.tolist())
        logprobs.append((-5 - torch.rand(length, generator=rng)).tolist())
        masked = run.masked_from is not None and place >= run.masked_from
        masks.append([int((place + spot) % 4 != 2 and not masked) for spot in range(length)])
    rows: dict[str, Any] = {
        "prompt_ids": [tokenizer()(text)["input_ids"] for text in texts],
        "completion_ids": completions,
        "logprobs": logprobs if run.sampler_ratio else None,
    }
    return rows | ({"env_mask": masks} if run.tool_mask or run.masked_from is not None else {})


def trained(trainer: Any) -> dict[str, NDArray[Any]]:
    """Return the trained parameters of a trainer, whole, by the names that they have unwrapped."""
    parameters = {}
    for name, value in trainer.model.named_parameters():
        if value.requires_grad:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            parameters[name] = whole.detach().numpy().copy()
    return parameters
