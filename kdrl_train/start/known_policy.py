"""Keeps in a run folder what a checkpoint does not hold of the policy: its tokenizer, the tokens
that end a completion, and its config.json."""

import json
from typing import Any

from kdrl_train.config import TrainConfig
from kdrl_train.config.models import POLICY_FILE
from kdrl_train.config_file import differences
from kdrl_train.errors import require_file
from kdrl_train.model.eos import eos_ids
from kdrl_train.model.fingerprint import NOTES
from kdrl_train.model.folder import base_of, read_json, stored_file
from kdrl_train.model.teacher.client import vocabulary_hash
from kdrl_train.runfolder import jsonl
from kdrl_train.start.load import Loaded


def check_policy(config: TrainConfig, loaded: Loaded) -> dict[str, Any]:
    """Describe the policy besides its weights, and compare it with that of the run so far.

    Raises: ValueError for another one: the checkpoint's weights would be read by another tokenizer,
        or in another model.
    """
    now = _described(config, loaded)
    path = config.out / POLICY_FILE
    if not config.resume or not path.exists():  # an older version began it
        return now
    require_file(path)
    try:
        changed = differences(json.loads(path.read_text(encoding="utf-8")), now)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} must be as a run wrote it, got {error}: restore it, or, where model.policy is "
            "unchanged, delete it"
        ) from error
    if changed:
        listed = "; ".join(
            f"{key}: {a!s:.20} before, {b!s:.20} now" for key, (a, b) in changed.items()
        )
        raise ValueError(
            f"model.policy must be the model that the run began with, got another one in "
            f"{config.model.policy} ({listed}): restore it, or, where model.policy is unchanged, "
            f"delete {path} to go on with this one"
        )
    return now


def keep_policy(config: TrainConfig, description: dict[str, Any]) -> None:
    """Write the description of the policy into the run's folder."""
    jsonl.replace_text(config.out / POLICY_FILE, json.dumps(description, indent=1) + "\n")


def _described(config: TrainConfig, loaded: Loaded) -> dict[str, Any]:
    """Describe the policy that is loaded; of an adapter its base."""
    file = stored_file(base_of(config.model.policy), "config.json")
    settings = {} if file is None else read_json(file)
    return {
        "tokenizer": vocabulary_hash(loaded.tokenizer),
        "eos_ids": eos_ids(loaded.policy.model, loaded.tokenizer),
        "config": {key: value for key, value in settings.items() if key not in NOTES},
    }
