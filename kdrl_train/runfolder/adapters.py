"""Leaves the frozen base of a model with adapters out of checkpoints, which are kept apart from
whole ones."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from kdrl_train.config import ModelConfig


def has_adapters(model: nn.Module) -> bool:
    """Say whether a part of a model's parameters is trained; of a teacher none is."""
    return len({parameter.requires_grad for parameter in model.parameters()}) == 2


def of_trained(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a model's state that a checkpoint holds: of one with adapters, these."""
    if not has_adapters(model):
        return state
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in names}


def check_adapters(folder: Path, written: dict[str, Any], config: ModelConfig) -> list[str]:
    """Check that the adapters of a checkpoint, if it has some, are those that a model has.

    Args:
        folder: of the checkpoint.
        written: the section `model` of the run that wrote it.
        config: that of the model.
    Returns: what to warn of.
    Raises: ValueError if they are not.
    """
    before = {"rank": 0} | written.get("lora", {})
    now = asdict(config.lora)
    keys = ("rank", "alpha", "targets", "rslora") if before["rank"] else ("rank",)
    if any(_plain(before.get(key)) != _plain(now[key]) for key in keys):
        if before["rank"]:
            shown = ", ".join(f"{key} {_plain(before.get(key))}" for key in keys)
            remedy = f"set model.lora to {shown}, as in the run that wrote it"
        else:
            remedy = "leave model.lora out, or set model.policy to the folder that its run exported"
        raise ValueError(
            f"model.weights must have the adapters of this run, rank {now['rank']}, got {folder} "
            f"with rank {before['rank']}: {remedy}"
        )
    if before["rank"] and written.get("policy") != config.policy:
        return [
            f"the adapters of {folder} belong to {written.get('policy')}: make sure "
            f"that {config.policy} is the same model"
        ]
    return []


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
