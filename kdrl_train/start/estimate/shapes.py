"""Reads the sizes of a model from its config.json alone, on the meta device, without weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Holds the sizes of a dense decoder of transformers. All counts are exact."""

    parameters: int
    """All parameters; a tied head counts once."""
    layers: int
    layers_parameters: int
    """Parameters of all decoder layers together."""
    layer_parameters: int
    """Parameters of the largest decoder layer."""
    largest: int
    """Elements of the largest parameter."""
    hidden: int
    """H: width of the residual stream."""
    vocabulary: int
    """V: rows of the head."""
    heads_width: int
    """Attention heads times their width."""
    kv_width: int
    """Key-value heads times their width."""
    intermediate: int
    """Width of the gated MLP."""
    normed: int
    """Widths of a layer's norms over the residual stream, summed."""
    heads_normed: int
    """Widths of a layer's norms over queries and keys (Qwen3), summed."""
    tied: bool
    """Whether head and embedding are one parameter."""

    @property
    def root_parameters(self) -> int:
        """Counts the parameters outside the layers: embedding, head, last norm."""
        return self.parameters - self.layers_parameters

    @property
    def head_parameters(self) -> int:
        """Counts the parameters of the head, V · H."""
        return self.vocabulary * self.hidden

    @property
    def read_parameters(self) -> int:
        """Counts the parameters that are read to sample a token: all but an untied embedding."""
        return self.layers_parameters + self.head_parameters


def read_shape(folder: str, key: str) -> ModelShape:
    """Reads the sizes of the causal LM in a folder (its config.json is enough) or of a hub id.

    Args:
        key: "model.policy" or "model.teacher", for messages.
    Raises: ValueError if it is not a causal LM, or not a dense decoder.
    """
    if not folder:
        raise ValueError(f"{key} must name a folder or hub id, got nothing: set {key}")
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{key} must be a folder with the config.json of a causal LM of transformers, or a hub "
            f"id, got {folder!r} (looked in {Path.cwd()}): {error}"
        ) from error
    return shape_of(model, f"{key} = {folder!r}")


def shape_of(model: Any, name: str) -> ModelShape:
    """Returns the sizes of a causal LM on any device.

    Args:
        name: how messages call the model.
    Raises: ValueError for a mixture of experts, and for a model whose sizes are not in its
        configuration.
    """
    text = model.config.get_text_config()
    missing = [size for size in SIZES if not getattr(text, size, None)]
    experts = [f"{size} = {getattr(text, size)}" for size in EXPERTS if getattr(text, size, None)]
    blocks = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in blocks]
    if missing or experts or not layers:
        why = f"without {', '.join(missing or ['layers'])}" if not experts else experts[0]
        raise ValueError(
            f"{name} must be a dense decoder, got {type(model).__name__} ({why}): the "
            "memory of other models is not modelled"
        )
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    q = text.num_attention_heads * width
    kv = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width
    counts = [_count(layer.parameters()) for layer in layers]
    normed, heads_normed = _normed(layers[0], width, q, kv)
    head = model.get_output_embeddings().weight
    return ModelShape(
        parameters=_count(model.parameters()),
        layers=len(layers),
        layers_parameters=sum(counts),
        layer_parameters=max(counts),
        largest=max(parameter.numel() for parameter in model.parameters()),
        hidden=text.hidden_size,
        vocabulary=head.shape[0],
        heads_width=q,
        kv_width=kv,
        intermediate=text.intermediate_size,
        normed=normed,
        heads_normed=heads_normed,
        tied=head is model.get_input_embeddings().weight,
    )


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _normed(layer: nn.Module, width: int, q: int, kv: int) -> tuple[int, int]:
    """Sums the widths of a layer's norms: over the residual stream, and over queries and keys."""
    stream, heads = 0, 0
    for name, module in layer.named_modules():
        if not type(module).__name__.endswith("Norm"):
            continue
        size = module.get_parameter("weight").numel()
        leaf = name.rpartition(".")[2]
        if not leaf.startswith(("q", "k")):
            stream += size
        elif size == width:  # one norm for all heads
            heads += q if leaf.startswith("q") else kv
        else:
            heads += size
    return stream, heads
