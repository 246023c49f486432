"""Reads a folder of peft with a LoRA adapter: which base it is of, whether it can be used, and its
tensors. Merging needs no peft."""

import json
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from kdrl_train.config.models import LoraConfig
from kdrl_train.model import lora
from kdrl_train.model.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, refusal, stored_file

PREFIX = "base_model.model."
"""What peft writes before the names of the base's modules."""
EMPTY: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "bias": ("none",),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
"""Settings of peft that change what an adapter computes, or its base, and their values that do not.
A setting that the file lacks does not either."""


class Adapter(NamedTuple):
    """A LoRA adapter: each layer's weight is W + scale · B A."""

    rank: int
    alpha: float
    rslora: bool
    layers: dict[str, tuple[Tensor, Tensor]]
    """Name of a layer in the base -> A [r, in] and B [out, r]."""

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def read(name: str, key: str) -> Adapter:
    """Read the adapter in a folder, which is one by folder.is_adapter.

    Raises: ValueError naming the setting `key` for one that is no plain LoRA, and for other tensors
        than those of linear layers.
    """
    path = stored_file(name, ADAPTER_CONFIG)
    assert path is not None
    settings = json.loads(path.read_text(encoding="utf-8"))
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise refusal(key, name, f"its adapter must be of type LORA, got {kind}: {_merge_it()}")
    for setting, values in EMPTY.items():
        if setting in settings and settings[setting] not in values:
            why = f"its adapter has {setting} {settings[setting]!r}, which is not read here"
            raise refusal(key, name, f"{why}: {_merge_it()}")
    tensors = {name.removeprefix(PREFIX): t for name, t in _tensors(name, key).items()}
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    rank = settings.get("r")
    for tensor in [one for one in tensors if one.endswith(".lora_A.weight")]:
        layer = tensor.removesuffix(".lora_A.weight")
        A, B = tensors.pop(tensor), tensors.pop(f"{layer}.lora_B.weight", None)
        if B is None or A.ndim != 2 or B.ndim != 2 or not len(A) == B.shape[1] == rank:
            raise refusal(key, name, f"its adapter of {layer} has no A and B of rank {rank}")
        layers[layer] = A, B
    if tensors or not layers:
        other = next(iter(tensors), "no tensor of LoRA")
        raise refusal(key, name, f"its adapter has {other}, which is not read here: {_merge_it()}")
    alpha = float(settings.get("lora_alpha", 8))
    return Adapter(int(rank), alpha, bool(settings.get("use_rslora", False)), layers)


def _merge_it() -> str:
    return (
        "merge it into its base with peft (merge_and_unload), save the result with its tokenizer, "
        "and name that folder"
    )


def _tensors(name: str, key: str) -> dict[str, Tensor]:
    """Read the tensors of an adapter's file."""
    for file in ADAPTER_WEIGHTS:
        path = stored_file(name, file)
        if path is None:
            continue
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # damaged files raise many types
            why = f"{path} is damaged ({type(error).__name__}): download it again"
            raise refusal(key, name, why) from error
    raise refusal(key, name, f"its adapter has no weights ({' or '.join(ADAPTER_WEIGHTS)})")


def require_settings(name: str, settings: LoraConfig, key: str) -> Adapter:
    """Read the adapter in a folder, and check that its settings are those of model.lora.

    Raises: ValueError as read, and if they are not.
    """
    adapter = read(name, key)
    pairs = {
        "rank": (adapter.rank, settings.rank),
        "alpha": (adapter.alpha, settings.alpha),
        "rslora": (adapter.rslora, settings.rslora),
    }
    for setting, (before, now) in pairs.items():
        if before != now:
            raise ValueError(
                f"model.lora.{setting} must be that of the adapter in {name}, {before}, got {now}: "
                "set it, or leave model.lora out to train all weights, with the adapter merged"
            )
    return adapter


@torch.no_grad()
def continue_from(model: Any, name: str, key: str) -> None:
    """Copy the adapter in a folder into those of a model, whose settings it has.

    Raises: ValueError where it is of other layers.
    """
    stored, layers = read(name, key).layers, lora.adapted(model)
    if stored.keys() != layers.keys():
        other = sorted(stored.keys() ^ layers.keys())
        targets = sorted({layer.rpartition(".")[2] for layer in stored})
        raise ValueError(
            f"model.lora.targets must be the layers of the adapter in {name}, got others, first "
            f"{other[0]}: set it to {' '.join(targets)}"
        )
    for layer, (A, B) in stored.items():
        layers[layer].lora_A[lora.ADAPTER].weight.copy_(A)
        layers[layer].lora_B[lora.ADAPTER].weight.copy_(B)


@torch.no_grad()
def merge(model: Any, name: str, key: str) -> None:
    """Add the adapter in a folder to the weights of its base, in place.

    A sum is computed in float32 and rounded once to the weight's dtype.

    Raises: ValueError as read, and for layers that the base does not have.
    """
    adapter = read(name, key)
    parameters = dict(model.named_parameters())
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    for layer, (A, B) in adapter.layers.items():
        weight = parameters.get(f"{layer}.weight")
        change = B.float() @ A.float() * adapter.scale
        if weight is not None and type(model.get_submodule(layer)).__name__ == "Conv1D":
            change = change.T
        if weight is None or weight.shape != change.shape or not weight.is_floating_point():
            shape = "no such layer" if weight is None else f"one of shape {list(weight.shape)}"
            raise refusal(
                key,
                name,
                f"its adapter is of {layer}, {list(change.shape)}, and its base has {shape}: name "
                "the base in adapter_config.json that it was trained on, in 16 or 32 bits",
            )
        if weight is embeddings.weight and head.weight is weight:
            raise refusal(key, name, f"its adapter of {layer} is tied to the base's embeddings")
        weight.copy_(weight.float() + change)
