"""Takes the LM head of a model apart where peft has put something around it."""

from typing import Any

import torch

import kdrl_kernels as kk


def without_adapter(layer: Any) -> tuple[Any, kk.LowRank | None]:
    """Return the Linear of an LM head that a forward now computes with, and its active adapter.

    Args:
        layer: what get_output_embeddings() of a model returns, a layer of peft or none.
    Raises: ValueError for an adapter that is no plain LoRA: DoRA, several at once, dropout, a bias
        of its own.
    """
    if hasattr(layer, "modules_to_save"):  # peft trains a copy of the layer
        layer = _trained_copy(layer)
    if not hasattr(layer, "base_layer"):
        return layer, None
    return layer.get_base_layer(), _adapter(layer)


def _trained_copy(layer: Any) -> Any:
    """Return the module that a layer of peft's modules_to_save computes with."""
    names = layer.active_adapters
    if layer.disable_adapters or not set(names) & set(layer.modules_to_save):
        return layer.original_module
    return layer.modules_to_save[names[0]]


def _adapter(layer: Any) -> kk.LowRank | None:
    """Return the LoRA on a layer of peft; None where it is off or merged into the weight."""
    if layer.disable_adapters or layer.merged:
        return None
    if not isinstance(getattr(layer, "lora_A", None), torch.nn.ModuleDict):  # AdaLoRA: parameters
        raise ValueError(_refusal(f"got {type(layer).__name__}"))
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(_refusal(f"got {len(names)} at once, {', '.join(names)}"))
    name = names[0]
    dropout = layer.lora_dropout[name]
    reasons = {
        "DoRA or another variant": name in layer.lora_variant,
        "dropout": not isinstance(dropout, torch.nn.Identity) and dropout.p > 0,
        "a bias of its own": layer.lora_B[name].bias is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(_refusal(f"got one with {reason}"))
    return kk.LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def _refusal(what: str) -> str:
    return (
        f"an adapter on the LM head must be one plain LoRA without dropout, {what}: take lm_head "
        "out of target_modules, or set lora_dropout=0.0 and use_dora=False"
    )
