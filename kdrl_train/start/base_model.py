"""Keeps which base the adapters of a run belong to: a checkpoint holds the adapters alone."""

import json
from dataclasses import replace
from pathlib import Path

from kdrl_train import output
from kdrl_train.config import ModelConfig, TrainConfig
from kdrl_train.config.models import BASE_FILE
from kdrl_train.model.fingerprint import weights_hash
from kdrl_train.model.folder import base_of
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.best import resolved
from kdrl_train.runfolder.checkpoint import read
from kdrl_train.runfolder.resume import base_hash


def check_base(config: TrainConfig) -> dict[str, str | None] | None:
    """Describe the base of a run's adapters, and compare it with that of the checkpoint that they
    come from; None for a run without adapters.

    Raises: ValueError for another base.
    """
    if not config.model.lora.rank:
        return None
    name = base_of(config.model.policy)
    output.begin(f"hashing the base of the adapters, {name}", at_once=True)
    base = {"base": name, "weights": weights_hash(name)}
    source = config.out if config.resume else None
    if source is None and config.model.weights is not None:
        source = resolved(config.model.weights).parent.parent
    if source is not None:
        _require_same(source, base)
    return base


def model_of_adapters(config: ModelConfig) -> ModelConfig:
    """Return the model that the adapters of model.weights belong to: for the folders that their run
    has exported, in which adapters are merged already, its base.

    Raises: ValueError for a folder with other weights than the base has.
    """
    if config.weights is None or not config.lora.rank:
        return config
    checkpoint = read(resolved(config.weights))
    policy, run = checkpoint.config["model"]["policy"], checkpoint.folder.parent.parent
    if Path(config.policy).resolve().parent == run.resolve():
        return replace(config, policy=policy)
    if config.policy != policy:
        name = base_of(config.policy)
        _require_same(run, {"base": name, "weights": weights_hash(name)})
    return config


def _require_same(run: Path, base: dict[str, str | None]) -> None:
    """Raise ValueError where the weights of a base are not those that a run's folder describes."""
    before = base_hash(run)
    if None not in (before, base["weights"]) and before != base["weights"]:
        raise ValueError(
            f"model.policy must have the weights that the adapters of {run} were trained on, "
            f"got other ones in {base['base']} ({BASE_FILE} has their hash): restore that folder, "
            "or name a copy of it"
        )


def keep_base(config: TrainConfig, base: dict[str, str | None] | None) -> None:
    """Write the description of the base into the run's folder."""
    path = config.out / BASE_FILE
    if base is not None:
        jsonl.replace_text(path, json.dumps(base, indent=2) + "\n")
