"""Puts liger-kernel's layers (RMSNorm, SwiGLU or GEGLU, and RoPE) into a loaded model.

Its losses are not used: the loss is kdrl_kernels' own. liger-kernel replaces names in transformers'
module, so RoPE and every layer that is built later are replaced for all models of that architecture
in this process.
"""

import importlib
from importlib.util import find_spec
from typing import Any

import torch

REMEDY = "leave model.liger out"


def require_liger(device: torch.device) -> Any:
    """Import and return liger-kernel's patching module.

    Raises: ValueError if `device` is not a GPU, or Triton or liger-kernel is not installed.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        raise ValueError(
            "model.liger must be false without a GPU that Triton compiles for, got true on "
            f"{device.type}: {REMEDY}, or set model.device"
        )
    try:
        return importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        raise ValueError(
            f"model.liger must be false without liger-kernel, got true: {error}; "
            f"pip install 'kdrl-kernels[liger]', or {REMEDY}"
        ) from error


def patch_layers(module: Any, model: Any, key: str) -> None:
    """Put liger's layers into `model`, a causal LM of transformers, and leave its forward as it is.

    Args:
        module: what `require_liger` returned.
        key: "model.policy" or "model.teacher", which the message names.
    Raises: ValueError for an architecture that liger-kernel does not know.
    """
    kind = model.config.model_type
    if kind not in module.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"{key} must be of an architecture that liger-kernel knows when model.liger is true, "
            f"got {kind}: {REMEDY}"
        )
    module._apply_liger_kernel_to_instance(
        model, cross_entropy=False, fused_linear_cross_entropy=False
    )
