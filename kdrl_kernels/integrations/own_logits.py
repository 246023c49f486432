"""Compares what a trainer computes with an LM head and what the model itself computes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kdrl_kernels.head_config import backbone, head_scalars, require_head_alone
from kdrl_kernels.integrations.adapted_head import without_adapter
from kdrl_train.model.miniature import miniature

LENGTH = 12
"""Tokens of the sequence whose logits are compared."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest RMS difference as a share of the RMS of the logits: above the rounding of a deep model,
below what another formula gives."""
TOLERANCE_16_BITS = 0.05
LARGE_LOGITS = 30.0
"""RMS of the logits at which a cap is seen: models cap at 15 to 50."""
SPECIAL = re.compile(r"_token_(id|index)$")
"""Names of tokens that a configuration gives a meaning, such as an image's place."""


@torch.no_grad()
def require_own_logits(model: Any, name: str) -> None:
    """Raise ValueError where a model's logits are not those of its backbone, head and config.

    Where its weights are not whole here, or its attention does not run on their device, a small
    random copy of it is compared. A model that ZeRO-3 has partitioned is not compared, and neither
    is one whose code does not run on tokens alone.

    Args:
        model: a causal LM of transformers, without peft's wrapper; layers of it may carry adapters.
        name: what the message calls it.
    """
    require_head_alone(model)
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} must be a decoder alone, got {type(model).__name__}, which has an encoder: "
            "name another model"
        )
    weights = list(model.parameters())
    if any(hasattr(weight, "ds_id") for weight in weights):
        return
    whole = not any(weight.is_meta or isinstance(weight, DTensor) for weight in weights)
    if whole and _compared(model, name):
        return
    small = _small(model)
    if small is not None:
        _compared(small, name)


def _small(model: Any) -> Any:
    """Return a small random copy of a model on the CPU; None where none can be built.

    miniature says so by a ValueError, whatever the code of the model has raised: this forgives no
    less than _compared does.
    """
    with suppress(ValueError), torch.random.fork_rng(devices=[]):
        return miniature(model, torch.device("cpu"), torch.float32)
    return None


def _compared(model: Any, name: str) -> bool:
    """Compare logits, as they are and so large that a cap is seen; False if its code cannot run.

    Raises: ValueError where they differ.
    """
    inputs = _inputs(model)
    with _evaluating(model):
        try:
            theirs = model(**inputs).logits
        except Exception:  # whatever its code raises on this device, or without an image
            return False
        hidden = backbone(model)(**inputs).last_hidden_state
        _compare(model, name, _head_logits(model, hidden), theirs)
        size = _head_logits(model, hidden, scalars=False).float().square().mean().sqrt().item()
        factor = LARGE_LOGITS / max(size, 1e-6)
        with _multiplied(model.get_output_embeddings(), factor):
            theirs = model(**inputs).logits
        _compare(model, name, _head_logits(model, hidden * factor), theirs)
    return True


def _inputs(model: Any) -> dict[str, Any]:
    """Return a sequence of ordinary tokens."""
    configs = model.config, model.config.get_text_config()
    special: set[Any] = set()
    for name, value in (pair for one in configs for pair in vars(one).items()):
        if SPECIAL.search(name):
            special.update(value if isinstance(value, list) else [value])
    rows = len(model.get_input_embeddings().weight)
    tokens = [i for i in range(min(rows, 100)) if i not in special] or [0]
    ids = [[tokens[i % len(tokens)] for i in range(LENGTH)]]
    input_ids = torch.tensor(ids, device=model.device)
    mask = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of a model into evaluation mode, and afterwards back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _multiplied(layer: nn.Module, factor: float) -> Iterator[None]:
    """Multiply what a layer reads by a factor."""
    hook = layer.register_forward_pre_hook(lambda _layer, args: (args[0] * factor, *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _head_logits(model: Any, hidden: Tensor, *, scalars: bool = True) -> Tensor:
    """Compute logits as a head of ours has them; scalars: with scale and soft cap."""
    layer, adapter = without_adapter(model.get_output_embeddings())
    weight = layer.weight
    hidden = hidden.to(weight.device, weight.dtype)
    logits = nn.functional.linear(hidden, weight, getattr(layer, "bias", None))
    if adapter is not None:
        A, B = (x.to(hidden.dtype) for x in (adapter.A, adapter.B))
        logits = logits + adapter.scale * (hidden @ A.T @ B.T)
    if not scalars:
        return logits
    temperature, softcap = head_scalars(model.config.get_text_config())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits / temperature


def _compare(model: Any, name: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise ValueError where logits differ by more than rounding."""
    allowed = TOLERANCE.get(min(ours.dtype, theirs.dtype, key=_bits), TOLERANCE_16_BITS)
    ours, theirs = ours.double().to(theirs.device), theirs.double()
    same = ours == theirs  # also the minus infinity that a bias may hold
    error = torch.where(same, 0, ours - theirs).square().mean().sqrt().item()
    rms = torch.where(theirs.isfinite(), theirs, 0).square().mean().sqrt().item()
    if not error <= allowed * rms:  # so not where it is nan
        raise ValueError(
            f"{name} must compute logits as its configuration says, softcap(scale · (hidden · "
            f"weightᵀ + bias)), got {type(model).__name__}, whose own differ from that by "
            f"{error:.1e} where their RMS is {rms:.1e}: {_remedy(model)}"
        )


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _remedy(model: Any) -> str:
    """Say what to change: a cap or scale of which the model's code may know nothing."""
    temperature, softcap = head_scalars(model.config.get_text_config())
    scale, cap = 1 / temperature, None if softcap is None else softcap / temperature
    if (scale, cap) == (1.0, None):
        return "name another model"
    return (
        f"take the scale {scale:g} or the soft cap {cap if cap is None else f'{cap:g}'} out of its "
        "configuration if its code reads none, or name another model"
    )
