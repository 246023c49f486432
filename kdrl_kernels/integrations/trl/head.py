"""Says what the LM head of a transformers model is: weight, scalars, and an adapter on it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer import grpo_trainer
from trl.trainer.utils import maybe_gather_lm_head_ctx

import kdrl_kernels as kk
from kdrl_kernels.head_config import head_scalars
from kdrl_kernels.integrations.adapted_head import without_adapter


@dataclass(frozen=True, slots=True)
class ModelHead:
    """Holds a model's LM head: logits / temperature = z of kdrl_kernels.head.Head.

    The tensors are those of the moment: FSDP, ZeRO-3 and PEFT replace them, so a head is read
    again in each forward.
    """

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None
    adapter: kk.LowRank | None = None
    float32: bool = False
    """Whether it is computed in float32 outside of autocast (cast_lm_head_to_fp32)."""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of kdrl_loss and linear_logprobs beside hidden states and weight."""
        return {
            "bias": self.bias,
            "temperature": self.temperature,
            "softcap": self.softcap,
            "adapter": self.adapter,
        }

    def gathered(self) -> AbstractContextManager:
        """Enter a context in which ZeRO-3 has gathered the head; elsewhere it changes nothing."""
        parts = [self.weight, self.bias]
        if self.adapter is not None:
            parts += [self.adapter.A, self.adapter.B]
        return maybe_gather_lm_head_ctx(*parts)

    def arithmetic(self, hidden: Tensor) -> tuple[Tensor, AbstractContextManager]:
        """Return hidden states in the dtype of the head's arithmetic, and a context for it.

        Under autocast that is autocast's dtype, since a norm may end in float32.
        """
        device = hidden.device.type
        if self.float32:
            return hidden.float(), torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        return hidden, nullcontext()

    def check_zero3(self, backward: str) -> None:
        """Raise ValueError under ZeRO-3 for what reads the weight again in the backward pass."""
        if is_deepspeed_zero3_enabled() and (backward == "sketch" or self.adapter is not None):
            raise ValueError(
                "head_backward must be 'exact', and lm_head without an adapter, under DeepSpeed "
                f"ZeRO-3, got {backward!r} and {'no' if self.adapter is None else 'an'} adapter: "
                "their backward pass would read a weight that ZeRO-3 has freed"
            )

    def check_teacher(self) -> None:
        """Raise ValueError where an adapter is on this head, which a teacher's cannot have."""
        if self.adapter is not None:
            raise ValueError(
                "teacher_model must have no adapter on its LM head, got one: pass "
                "teacher_model.merge_and_unload()"
            )

    def teacher(self, hidden: Tensor) -> kk.TeacherHead:
        """Return this head with hidden states, for a loss against it.

        Raises: ValueError where an adapter is on it.
        """
        self.check_teacher()
        return kk.TeacherHead(
            self.arithmetic(hidden)[0],
            self.weight,
            bias=self.bias,
            temperature=self.temperature,
            softcap=self.softcap,
        )


def model_head(model: Any, temperature: float, *, float32: bool = False) -> ModelHead:
    """Return the LM head of a causal LM as its parameters are now.

    Args:
        model: a transformers model, without a wrapper of PEFT; layers of it may carry adapters.
        temperature: of the sampler.
        float32: of ModelHead.
    Raises: ValueError for a model without an LM head, or with an adapter on it that is no plain
        LoRA: DoRA, several at once, dropout, a bias of its own.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"model must have an LM head, got {type(model).__name__}")
    scalars = head_scalars(model.config.get_text_config(), temperature)
    layer, adapter = without_adapter(layer)
    return ModelHead(layer.weight, getattr(layer, "bias", None), *scalars, adapter, float32)


def bare(model: Any) -> Any:
    """Return a transformers model without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class NoLayer:
    """Has no instances: what TRL refuses to find on an LM head while adapters are allowed."""


@contextmanager
def head_adapters() -> Iterator[None]:
    """Let GRPOTrainer's constructor take a LoRA on the LM head, which its own head leaves out."""
    refused = getattr(grpo_trainer, "BaseTunerLayer", NoLayer)
    grpo_trainer.BaseTunerLayer = NoLayer
    try:
        yield
    finally:
        grpo_trainer.BaseTunerLayer = refused
