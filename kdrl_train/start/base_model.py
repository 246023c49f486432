"""Keeps which base the adapters of a run belong to: a checkpoint holds the adapters alone."""

import json
from pathlib import Path

from kdrl_train import output
from kdrl_train.config import TrainConfig
from kdrl_train.errors import written
from kdrl_train.model.fingerprint import weights_hash
from kdrl_train.model.folder import base_of
from kdrl_train.runfolder.best import resolved

FILE = "base.json"
"""The file of a run folder with the name of the base and a hash of its weights."""


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
    before = None if source is None else _read(source / FILE)
    if None not in (before, base["weights"]) and before != base["weights"]:
        raise ValueError(
            f"model.policy must have the weights that the adapters of {source} were trained on, "
            f"got other ones in {name} ({FILE} has their hash): restore that folder, or name a "
            "copy of it"
        )
    return base


def keep_base(config: TrainConfig, base: dict[str, str | None] | None) -> None:
    """Write the description of the base into the run's folder."""
    path = config.out / FILE
    if base is not None:
        with written(path):
            path.write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> str | None:
    """Read the hash of the weights in such a file; None where there is none."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be readable JSON, got {error}: delete it") from error
    weights = described.get("weights") if isinstance(described, dict) else None
    return weights if isinstance(weights, str) else None
