"""Reads the sizes of a model from its config.json alone, on the meta device, without weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdrl_train.config import TrainConfig
from kdrl_train.config.models import is_url
from kdrl_train.model.folder import auto_class, one_line, read_config
from kdrl_train.start.estimate.layers import LayerShape, layer_shapes, layers_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Holds the sizes of a causal LM of transformers. Counts of parameters are exact."""

    parameters: int
    """All parameters; a tied head counts once, and so does a layer that is used several times."""
    layers_parameters: int
    """Parameters of all decoder layers together."""
    largest: int
    """Elements of the largest parameter."""
    hidden: int
    """H: width of the residual stream."""
    vocabulary: int
    """V: rows of the head."""
    tied: bool
    """Whether head and embedding are one parameter."""
    each: tuple[LayerShape, ...]
    """The decoder layers in their order."""

    @property
    def layers(self) -> int:
        """Counts the decoder layers."""
        return len(self.each)

    @property
    def layer_parameters(self) -> int:
        """Counts the parameters of the largest decoder layer."""
        return max(layer.parameters for layer in self.each)

    @property
    def inner(self) -> int:
        """Counts the numbers of a token between the projections of the widest layer."""
        return max(layer.inner for layer in self.each)

    @property
    def scans(self) -> bool:
        """Says whether some layer has an SSM or linear attention."""
        return any(layer.scanned for layer in self.each)

    @property
    def active_parameters(self) -> int:
        """Counts the parameters of the layers that compute one token."""
        return sum(layer.active for layer in self.each)

    @property
    def root_parameters(self) -> int:
        """Counts the parameters outside the layers: embedding, head, last norm."""
        return self.parameters - self.layers_parameters

    @property
    def head_parameters(self) -> int:
        """Counts the parameters of the head, V · H."""
        return self.vocabulary * self.hidden

    def read_parameters(self, batch: int) -> float:
        """Counts the parameters that are read to sample a token of each of `batch` completions.

        They are all but an untied embedding; of the experts those that some token meets, where
        each token chooses its own at random.
        """
        met = sum(
            layer.parameters - (layer.parameters - layer.active) * layer.missed ** (batch - 1)
            for layer in self.each
        )
        return met + self.head_parameters


def read_shape(folder: str, key: str, trusted: bool = False) -> ModelShape:
    """Reads the sizes of the causal LM in a folder (its config.json is enough) or of a hub id.

    Args:
        key: "model.policy" or "model.teacher", for messages.
        trusted: model.trust_remote_code: whether code in its folder may be run.
    Raises: ValueError if it is not a causal LM, or has a layer of an unknown kind.
    """
    return shape_of(read_model(folder, key, trusted), f"{key} = {folder!r}")


def read_model(folder: str, key: str, trusted: bool = False) -> Any:
    """Builds the causal LM of a folder or hub id on the meta device, as read_shape takes them."""
    if not folder:
        raise ValueError(f"{key} must name a folder or hub id, got nothing: set {key}")
    try:
        config = read_config(folder, trusted)
        with torch.device("meta"):
            model = auto_class(config).from_config(
                config,
                dtype=torch.float32,
                attn_implementation=None,  # not one that config.json names: it may be downloaded
                trust_remote_code=trusted,
            )
    except Exception as error:  # a model's code may raise anything for a config that is not its own
        raise ValueError(
            f"{key} must be a folder with the config.json of a causal LM of transformers, or a hub "
            f"id, got {folder!r} (looked in {Path.cwd()}): {one_line(error)}"
        ) from error
    return model


def shape_of(model: Any, name: str) -> ModelShape:
    """Returns the sizes of a causal LM on any device.

    Args:
        name: how messages call the model.
    Raises: ValueError for a model with a layer of an unknown kind.
    """
    try:
        head = model.get_output_embeddings().weight
        each = layer_shapes(model)
        inside = {p for layer in layers_of(model) for p in layer.parameters()}
        tied = head is model.get_input_embeddings().weight
    except Exception as error:  # a model of a kind that nobody has thought of
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{name} must be a model whose layers are known, got {type(model).__name__}: {why}; "
            "its memory is not estimated, but it may be trained all the same"
        ) from error
    return ModelShape(
        parameters=_count(model.parameters()),
        layers_parameters=_count(inside),
        largest=max(parameter.numel() for parameter in model.parameters()),
        hidden=head.shape[1],
        vocabulary=head.shape[0],
        tied=tied,
        each=tuple(each),
    )


def largest_first(shapes: Iterable[ModelShape]) -> tuple[ModelShape, ...]:
    """Orders models by the number of their parameters, the largest first."""
    return tuple(sorted(shapes, key=lambda shape: -shape.parameters))


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def served_heads(config: TrainConfig) -> tuple[ModelShape, ...]:
    """Returns the shapes of teachers behind a URL of which the head is read.

    Raises: ValueError as read_shape.
    """
    if not config.method.is_exact:
        return ()
    return tuple(
        read_shape(
            str(config.teacher.of(name).head),
            config.teacher.head_key(name),
            config.model.trust_remote_code,
        )
        for name, place in config.model.teacher_places.items()
        if is_url(place)
    )
