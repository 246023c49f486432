"""Runs verl's FSDP engine on a CPU: a platform, tiny models, a batch of rollouts, an engine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ["VERL_PLATFORM"] = "cpu"
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # the tests load the plugin, installed or not

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config
from verl import DataProto
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.trainer.config import CheckpointConfig
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    ActorConfig,
    DistillationConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    PolicyLossConfig,
)
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding

from kdrl_kernels.integrations.sequence_weights import WEIGHT
from kdrl_kernels.integrations.verl import KdrlDistillationLossConfig
from kdrl_kernels.integrations.verl.topk import KEY

V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """The device that verl's engines run on here."""

    device_name = "cpu"
    vendor_name = "none"
    device_module = torch.cpu

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(
        self,
        device_index: int = 0,  # noqa: ARG002
    ) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "NO_DEVICES"

    def nvtx_range(self, msg: str) -> Any: ...

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def cudart(self) -> Any: ...

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False


def tiny(config: PretrainedConfig, seed: int = 0) -> Any:
    """Make a causal LM with weights that are large enough to tell tokens apart."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Open the process group that verl's engines want, of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def saved(folder: Path, **sizes: Any) -> Path:
    """Save a tiny Qwen2 where verl loads it from."""
    tiny(Qwen2Config(**(SIZES | sizes))).save_pretrained(folder / "model")
    return folder / "model"


def engine(
    model: Path,
    backend: str | None,
    lr: float = 1e-2,
    precision: dict[str, str] | None = FP32,
    **options: Any,
) -> Any:
    """Build verl's FSDP2 engine; without a backend it computes full logits.

    precision: None is verl's own, float32 weights and bfloat16 arithmetic.
    """
    # a module that asks for the platform
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: PLC0415

    packed = options.pop("use_remove_padding", True)
    checkpointing = options.pop("enable_gradient_checkpointing", False)
    model_config = HFModelConfig(
        path=str(model),
        load_tokenizer=False,
        enable_gradient_checkpointing=checkpointing,
        use_remove_padding=packed,
        use_fused_kernels=backend is not None,
        fused_kernel_options={"impl_backend": backend},
        override_config={"attn_implementation": "eager"},
        **options,
    )
    engine_config = FSDPEngineConfig(
        strategy="fsdp2", mixed_precision=precision, use_torch_compile=False
    )
    optimizer = FSDPOptimizerConfig(lr=lr, total_training_steps=10, clip_grad=1e9)
    built = FSDPEngineWithLMHead(model_config, engine_config, optimizer, CheckpointConfig())
    built.initialize()
    return built


def rollouts(groups: int = 2, size: int = 4, seed: int = 0, topk: int = 0) -> DataProto:
    """Draw a batch as verl's trainer has it before the update: padded left and right.

    The last group is all wrong; the second token of each completion is a tool's. With topk the
    teacher's numbers are those of its best tokens, not of the sampled ones.
    """
    rng = torch.Generator().manual_seed(seed)
    B, P, L = groups * size, 5, 6
    prompt_lengths = torch.randint(1, P + 1, (B,), generator=rng)
    lengths = torch.randint(2, L + 1, (B,), generator=rng)
    attention = torch.cat(
        [torch.arange(P).flip(0) < prompt_lengths[:, None], torch.arange(L) < lengths[:, None]], 1
    ).long()
    ids = torch.randint(1, V, (B, P + L), generator=rng) * attention
    response_mask = attention[:, P:].clone()
    response_mask[:, 1] = 0
    right = torch.rand(B, generator=rng).round()
    right[0], right[1] = 1, 0
    right[-size:] = 0
    scores = torch.zeros(B, L)
    scores[torch.arange(B), lengths - 1] = right
    tensors = {
        "prompts": ids[:, :P],
        "responses": ids[:, P:],
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "response_mask": response_mask,
        "old_log_probs": torch.randn(B, L, generator=rng) - 4,
        "advantages": torch.randn(B, L, generator=rng) * response_mask,
        "token_level_scores": scores,
        "teacher_logprobs": torch.randn(B, P + L, 1, generator=rng) - 4,
        "teacher_ids": ids[:, :, None].roll(-1, 1),
    }
    if topk:
        best = torch.randn(B, P + L, V, generator=rng).log_softmax(-1).topk(topk)
        tensors["teacher_logprobs"], tensors["teacher_ids"] = best.values, best.indices
    uids = np.array([f"prompt {r // size}" for r in range(B)], dtype=object)
    return DataProto.from_dict(tensors, {"uid": uids}, {"temperature": 1.0})


def update_batch(batch: DataProto, fused: bool, micro_batch: int = 4, **keys: Any) -> Any:
    """Turn a batch into what an engine's train_batch gets, by the trainer's own functions."""
    data = left_right_2_no_padding(batch.to_tensordict())
    defaults = {
        "calculate_entropy": True,
        "global_batch_size": len(batch),
        "use_fused_kernels": fused,
        "use_remove_padding": True,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": micro_batch,
    }
    tu.assign_non_tensor(data, **(defaults | keys))
    return data


def actor_config(**options: Any) -> ActorConfig:
    """Make the settings of an actor whose groups have four completions."""
    mode = options.pop("loss_mode", "kdrl")
    return ActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=4,
        policy_loss=PolicyLossConfig(loss_mode=mode),
        **options,
    )


def joint_loss(actor: ActorConfig, **options: Any) -> Any:
    """Bind verl's loss to the settings, as its worker does; options of KDRL's distillation."""
    config = DistillationConfig(distillation_loss=KdrlDistillationLossConfig(**options))
    return partial(distillation_ppo_loss, config=actor, distillation_config=config)


def policy_gradient(actor: ActorConfig) -> Any:
    """Bind verl's loss without a teacher."""
    return partial(ppo_loss, config=actor)


def weighted(built: Any, data: Any, loss: Any) -> Any:
    """Give a batch the weights that train_batch gives it before forward and backward."""
    # a module that loads the engines, which ask for the platform
    from kdrl_kernels.integrations.verl.steps import batch_weights  # noqa: PLC0415

    settings = getattr(loss.keywords.get("distillation_config"), "distillation_loss", None)
    if settings is not None:
        data[WEIGHT] = batch_weights(built, data, settings, loss.keywords["config"].rollout_n)
        if settings.topk_term is not None:
            tu.assign_non_tensor_data(data, KEY, settings.topk_term)
    return data


def gradients(built: Any, data: Any, loss: Any) -> tuple[float, dict[str, Tensor]]:
    """Run forward and backward of an update; the loss, and each parameter's gradient."""
    with built.train_mode():
        built.optimizer_zero_grad()
        outputs = built.forward_backward_batch(weighted(built, data, loss), loss)
        grads = {
            name: parameter.grad.full_tensor().clone()
            for name, parameter in built.module.named_parameters()
            if parameter.requires_grad
        }
        built.optimizer_zero_grad()
    return sum(outputs["loss"]), grads


def run(built: Any, loss: Any, fused: bool = True, **keys: Any) -> tuple[float, dict[str, Tensor]]:
    """Run forward and backward of rollouts()."""
    return gradients(built, update_batch(rollouts(), fused=fused, **keys), loss)
