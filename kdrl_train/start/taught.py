"""Compares the prompts of a run with those that its policy read in `sft`."""

from pathlib import Path

from kdrl_train.config import DataConfig
from kdrl_train.config_file import load_yaml

SFT_FILE = "sft.yaml"
_WRITTEN = ("prompt_template", "chat_template", "system_prompt")


def taught_otherwise(policy: str, data: DataConfig) -> list[str]:
    """Say in which settings `sft` wrote the prompts of a policy otherwise than `data` does.

    A line break that is missing at the end of the prompt is enough to lose most right answers.
    Returns: one sentence, or none; none where the folder is not one of `sft`.
    """
    file = Path(policy) / SFT_FILE
    if not file.is_file():
        return []
    try:
        learnt = load_yaml(file).get("data")
    except ValueError:  # another program's file
        return []
    if not isinstance(learnt, dict):
        return []
    differing = [
        f"data.{name} {learnt[name]!r}"
        for name in _WRITTEN
        if name in learnt and learnt[name] != getattr(data, name)
    ]
    if not differing:
        return []
    return [f"the policy learnt to read prompts with {', '.join(differing)}, as {file} says"]
