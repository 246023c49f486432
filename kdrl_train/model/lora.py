"""Puts LoRA adapters of peft into a policy: y = W x + scale · B A x, where A and B are trained.

peft replaces each adapted layer by one that holds it as `base_layer`, beside `lora_A` and `lora_B`;
the model keeps its class. W is frozen in the compute dtype, A and B are float32. A is drawn at
random and B is 0, so the policy starts as its base. What leaves the trainer (weights for an engine,
the exported model) has the layers' plain names, and W + scale · B A in their place.
"""

import importlib
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import kdrl_kernels as kk
from kdrl_train.config.models import LoraConfig
from kdrl_train.errors import needs_extra
from kdrl_train.settings import nearest

ADAPTER = "default"
"""peft's name of the one adapter."""
ALL = "all-linear"
KEPT = "kdrl_lora"
"""The attribute of an adapted model that holds peft's configuration of its adapter."""


def require_peft() -> Any:
    """Import peft. Raises: ExtraError without it."""
    with needs_extra("lora"):
        return importlib.import_module("peft")


def inject(model: Any, config: LoraConfig, seed: int) -> None:
    """Put adapters into a causal LM in place, and freeze everything else.

    seed: A is a function of it, of the layers and of the rank, on any number of processes.
    Raises: ValueError for targets that are no linear layers of the model; ExtraError without peft.
    """
    peft = require_peft()
    targets = _targets(model, config.targets)
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rslora,
        target_modules=targets,
        fan_in_fan_out=transposed,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # of a head beside Conv1D layers, which peft treats as it should
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True but")
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    setattr(model, KEPT, settings)
    dtype = torch.promote_types(torch.float32, next(iter(dtypes.values())))
    for layer in adapted(model).values():
        layer.cast_input_dtype_enabled = False  # autocast casts A and B, without a copy of x
        for part in (layer.lora_A, layer.lora_B):
            part[ADAPTER].to(dtype)


def _targets(model: Any, names: tuple[str, ...]) -> list[str]:
    """Return the last parts of the names of the layers to adapt.

    Raises: ValueError for a name that no linear layer has, and for a head tied to the embeddings.
    """
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    inner = {_suffix(name) for name, module in linear.items() if module is not head}
    chosen = set[str]()
    for name in names:
        if name == ALL:
            chosen |= inner
            continue
        layers = [module for path, module in linear.items() if f".{path}".endswith(f".{name}")]
        if not layers:
            known = sorted({_suffix(path) for path in linear})
            raise ValueError(
                f"model.lora.targets must name linear layers of {type(model).__name__}, got "
                f"{name!r}{nearest(name, known)}: choose from {ALL}, {', '.join(known)}"
            )
        if head in layers and head.weight is model.get_input_embeddings().weight:
            raise ValueError(
                f"model.lora.targets must leave out a head that is tied to the embeddings, got "
                f"{name!r}: what is merged would change them too; leave it out"
            )
        chosen.add(name)
    return sorted(chosen)


def _is_linear(module: nn.Module) -> bool:
    """Say whether a layer is a product with one matrix: torch's, GPT-2's or bitsandbytes'."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _suffix(name: str) -> str:
    """Return the last part of a layer's name; two parts where the last is a number."""
    *_, parent, last = ("", "", *name.split("."))
    return f"{parent}.{last}" if last.isdigit() else last


def adapted(model: nn.Module) -> dict[str, Any]:
    """Return the adapted layers of a model by their names; empty for a model without adapters."""
    modules = model.named_modules()
    return {name: m for name, m in modules if hasattr(m, "base_layer") and hasattr(m, "lora_A")}


def head_adapter(head: Any) -> kk.LowRank | None:
    """Return the adapter of an LM head; None where it has none, or computes without it now."""
    if not hasattr(head, "lora_A") or head.disable_adapters:
        return None
    A, B = head.lora_A[ADAPTER].weight, head.lora_B[ADAPTER].weight
    return kk.LowRank(A, B, head.scaling[ADAPTER])


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Compute as the base within the block: no second copy of a teacher or reference is needed."""
    layers = adapted(model).values()
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters(False) would also freeze A and B
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def plain_name(name: str, layers: Mapping[str, Any]) -> str | None:
    """Return the name of a tensor in the model without adapters; None for a part of an adapter.

    layers: those of `adapted`.
    """
    owner = name
    while owner:
        owner = owner.rpartition(".")[0]
        if owner in layers:
            rest = name.removeprefix(f"{owner}.")
            kept = rest.removeprefix("base_layer.")
            return None if kept == rest else f"{owner}.{kept}"
    return name


def merged(layer: Any, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return W + scale · B A of an adapted layer, from whole tensors, in the dtype of A and B."""
    with torch.no_grad():
        change = (B @ A) * layer.scaling[ADAPTER]
        return weight.to(A) + (change.T if layer.fan_in_fan_out else change)


@torch.no_grad()
def merge_in_place(model: nn.Module, dtype: torch.dtype) -> None:
    """Add the adapters of a model that is not sharded to the weights beside them, and switch them
    off; beside quantised weights they stay, in the dtype that computes."""
    for layer in adapted(model).values():
        if not layer.base_layer.weight.is_floating_point():
            layer.lora_A.to(dtype)
            layer.lora_B.to(dtype)
            continue
        weight, parts = layer.base_layer.weight, (layer.lora_A, layer.lora_B)
        weight.copy_(merged(layer, weight, *(part[ADAPTER].weight for part in parts)))
        layer._disable_adapters = True


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state that the model would have without adapters, which are merged into it.

    state: the whole tensors of the model's state_dict, by their names there.
    """
    layers = adapted(model)
    result = {}
    for name, tensor in state.items():
        plain = plain_name(name, layers)
        if plain is None:
            continue
        owner = plain.rpartition(".")[0]
        result[plain] = tensor
        if owner in layers and name == f"{owner}.base_layer.weight":
            A, B = (state[f"{owner}.{part}.{ADAPTER}.weight"] for part in ("lora_A", "lora_B"))
            result[plain] = merged(layers[owner], tensor, A, B)
    return result


def adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters' tensors by the names that peft gives them in a folder."""
    layers = adapted(model)
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.contiguous()
        for name, tensor in state.items()
        if plain_name(name, layers) is None
    }


def count(model: Any, config: LoraConfig) -> int:
    """Count the parameters that adapters would have in a model, on any device, without peft."""
    targets = _targets(model, config.targets)
    return sum(
        config.rank * sum(module.weight.shape)
        for name, module in model.named_modules()
        if _is_linear(module) and any(f".{name}".endswith(f".{target}") for target in targets)
    )


def head_rank(model: Any, config: LoraConfig) -> int:
    """Return the rank of the adapter that the LM head would have; 0: none."""
    head, targets = model.get_output_embeddings(), _targets(model, config.targets)
    (name,) = (name for name, module in model.named_modules() if module is head)
    return config.rank if any(f".{name}".endswith(f".{target}") for target in targets) else 0


def parameters(model: nn.Module) -> tuple[int, int]:
    """Count the parameters that are trained, and all."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters())


def summary(model: Any) -> str:
    """Say in a line what is trained of an adapted model."""
    settings, layers = getattr(model, KEPT), adapted(model)
    trained, total = parameters(model)
    share = 100 * trained / total
    digits = max(0, 1 - math.floor(math.log10(share))) if share else 1
    return (
        f"LoRA rank {settings.r} on {len(layers)} layers: {trained:,} parameters are trained, "
        f"{share:.{digits}f}%"
    )
