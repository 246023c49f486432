"""Models and tokenizers from folders or hub ids, on the run's device."""

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdrl_train.config import ModelConfig, TrainConfig
from kdrl_train.model import attention
from kdrl_train.model.fsdp import shard
from kdrl_train.model.liger import patch_layers, require_liger
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.ranks import ALONE, World


class HasVocabulary(Protocol):
    """A teacher, as far as the policy's vocabulary depends on it: in process, or a server's."""

    @property
    def vocab_size(self) -> int | None:
        """Columns of its head; None where nobody says."""


def device_of(config: ModelConfig) -> torch.device:
    """The run's device; "auto" is cuda where there is one, else cpu. Under torchrun each rank has
    the GPU of its number on the machine."""
    device = torch.device(config.device if config.device != "auto" else _best_device())
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_device(config: ModelConfig) -> torch.device:
    """The run's device; a GPU named by its index becomes the current one, where kernels launch."""
    device = device_of(config)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model folder or hub id."""
    return AutoTokenizer.from_pretrained(folder)


def load_model(
    folder: str, key: str, config: ModelConfig, dtype: torch.dtype, world: World = ALONE
) -> Any:
    """A causal LM from a folder or hub id, in evaluation mode: on the run's device or, for the
    ranks of a launched world to shard, in CPU memory on the first and on the meta device elsewhere.

    Args:
        folder: config.policy or config.teacher.
        key: "model.policy" or "model.teacher", for messages.
        config: device, attention and layer kernels.
        dtype: of the weights.
        world: all its ranks call it together.
    Raises: ValueError for a name that is neither a model folder nor a loadable hub id, and where
        liger-kernel's layers are asked for and cannot be had; over several ranks RankError.
    """
    if not folder:
        raise ValueError(f"{key} must name a folder or hub id, got nothing: set {key}")
    device = use_device(config)
    liger = require_liger(device) if config.liger else None
    found: list[Any] = []
    make = _read if world.main else _shell
    world.share(lambda: found.append(make(folder, key, dtype, config.attention)))
    (model,) = found
    model.generation_config = world.on_main(lambda: model.generation_config)  # a shell has none
    chosen = attention.choose(model, device, getattr(torch, config.dtype))
    if config.attention is None and chosen is not None:
        model.set_attn_implementation(chosen)
    if liger is not None:
        patch_layers(liger, model, key)
    return model.eval() if world.launched else model.to(device).eval()


def _read(folder: str, key: str, dtype: torch.dtype, attention_name: str | None) -> Any:
    """A model with its weights, in CPU memory."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention_name
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{key} must be a folder with a causal LM of transformers, or a hub id, got "
            f"{folder!r} (looked in {Path.cwd()}): {error}"
        ) from error


def _shell(folder: str, _key: str, dtype: torch.dtype, attention_name: str | None) -> Any:
    """The same model on the meta device: what its weights are, without them."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention_name
        )


def load_teacher(config: TrainConfig, world: World = ALONE) -> Teacher | None:
    """The teacher in its compute dtype, sharded under torchrun; None where the method has no
    distillation.

    Raises: ValueError when the method distils and model.teacher is not set.
    """
    if config.method.kd is None:
        return None
    if config.model.teacher is None:
        raise ValueError(
            f'model.teacher must name a folder or hub id when method.kd is "{config.method.kd}", '
            "got nothing: set model.teacher, or use --preset grpo"
        )
    dtype = getattr(torch, config.model.dtype)
    model = load_model(config.model.teacher, "model.teacher", config.model, dtype, world)
    teacher = Teacher(model, temperature=config.sampling.temperature, compute_dtype=dtype)
    if world.launched:
        shard(teacher, use_device(config.model), world, offload=config.model.offload_teacher)
    return teacher


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass; transformers renamed the method after 5.17."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


def load_policy(
    config: TrainConfig,
    teacher: HasVocabulary | None,
    world: World = ALONE,
    policy_class: type[Policy] = Policy,
) -> Policy:
    """The policy, its weights in float32, sharded under torchrun; its vocabulary ends where the
    teacher's does."""
    model = load_model(config.model.policy, "model.policy", config.model, torch.float32, world)
    if config.model.gradient_checkpointing:
        checkpoint_activations(model)
    columns = model.get_output_embeddings().weight.shape[0]
    theirs = None if teacher is None else teacher.vocab_size
    policy = policy_class(
        model,
        config.method,
        vocab_size=columns if theirs is None else min(columns, theirs),
        workspace_bytes=config.optim.workspace_bytes,
        head_impl=config.optim.head_impl,
        temperature=config.sampling.temperature,
        compute_dtype=getattr(torch, config.model.dtype),
    )
    if world.launched:
        shard(policy, use_device(config.model), world, offload=config.model.offload_policy)
    return policy
