"""Compares how the prompts of two data sets are written, such as those of `sft` and of a run."""

from pathlib import Path
from typing import Any

from kdrl_train.config import DataConfig
from kdrl_train.config_file import load_yaml, update

SFT_FILE = "sft.yaml"


def written_otherwise(tokenizer: Any, one: DataConfig, other: DataConfig) -> list[str]:
    """Name the settings that say how a prompt is written, and differ.

    Without a chat template only prompt_template is read.
    """
    names = ["prompt_template"]
    if getattr(tokenizer, "chat_template", None) is not None:
        names += ["chat_template", "system_prompt", "template_arguments"]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def taught_otherwise(policy: str, tokenizer: Any, data: DataConfig) -> list[str]:
    """Say in which settings `sft` wrote the prompts of a policy otherwise than `data` does.

    A line break that is missing at the end of the prompt is enough to lose most right answers.
    Returns: one sentence, or none; none where the folder is not one of `sft`.
    """
    file = Path(policy) / SFT_FILE
    if not file.is_file():
        return []
    try:
        section = load_yaml(file).get("data")
        learnt = update(DataConfig(), section if isinstance(section, dict) else {})
    except ValueError:  # another program's file, or an older version's
        return []
    if not isinstance(section, dict):
        return []
    names = written_otherwise(tokenizer, learnt, data)
    if not names:
        return []
    differing = ", ".join(f"data.{name} {getattr(learnt, name)!r}" for name in names)
    return [f"the policy learnt to read prompts with {differing}, as {file} says"]
