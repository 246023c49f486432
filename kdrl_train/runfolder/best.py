"""Follows the best score of a run's evaluations, whose checkpoint is kept: best.json names it."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.config_file import to_dict
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.jsonl import Record

FILE = "best.json"
METRIC = "eval_avg_at_k"
_CHECKPOINT = re.compile(r"checkpoints/step_\d{6,}")


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far."""

    step: int
    """Optimiser steps done."""
    score: float
    """Its METRIC."""


class BestSoFar:
    """Follows the best score of the evaluations that measure the same thing.

    Args:
        folder: the run folder, which holds a best.json if there was a best one before.
        first: the step at which the run starts; what came after it is measured again.
        measured: what makes two scores comparable; after a change the search begins anew.
        training: how completions are sampled where an evaluation does not say.
    Raises: ValueError for a best.json that is damaged.
    """

    def __init__(
        self, folder: Path, first: int, measured: dict[str, Any], training: SamplingConfig
    ) -> None:
        self.path, self.measured = folder / FILE, measured
        self.changed = False
        """Whether best.json is of another evaluation."""
        self.now: Best | None = None
        self.previous: Best | None = None
        """The best one before `now`, whose checkpoint is there until that of `now` is."""
        if not self.path.is_file():
            return
        content = read(self.path)
        before, now = (comparable(one, training) for one in (content["measured"], measured))
        self.changed = before != now
        if not self.changed:
            saved = [Best(**one) for one in (content["best"], content["previous"]) if one]
            here = [one for one in saved if one.step <= first and self.checkpoint(one).is_dir()]
            self.now = next(iter(here), None)

    def checkpoint(self, best: Best) -> Path:
        """Return the folder of its checkpoint."""
        return self.path.parent / _name(best)

    def is_after(self, done: int) -> bool:
        """Whether the best evaluation is the one after `done` optimiser steps."""
        return self.now is not None and self.now.step == done

    def add(self, record: Record) -> bool:
        """Follow one step's record; returns whether its evaluation is the best so far."""
        score = record.get(METRIC)
        if score is None or (self.now is not None and score <= self.now.score):
            return False
        self.now, self.previous = Best(record["step"] + 1, score), self.now
        return True

    def write(self) -> None:
        """Write best.json, before the checkpoint that it names has its name: a process killed in
        between leaves the one before."""
        if self.now is not None:
            content = {
                "checkpoint": _name(self.now),
                "metric": METRIC,
                "best": asdict(self.now),
                "previous": None if self.previous is None else asdict(self.previous),
                "measured": self.measured,
            }
            jsonl.replace_text(self.path, json.dumps(content, indent=1) + "\n")


def _name(best: Best) -> str:
    return f"checkpoints/step_{best.step:06d}"


def measures(config: TrainConfig, problems: dict[str, Any]) -> dict[str, Any]:
    """Return what `comparable` reads of an evaluation, for best.json.

    problems: count and sha256 of the held-out problems.
    """
    kept = ("samples", "greedy", "temperature", "max_new_tokens")
    evaluation = to_dict(config.eval)
    data = {"system_prompt": config.eval.data.system_prompt}
    settings = {name: evaluation[name] for name in kept} | {"data": data, "problems": problems}
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def comparable(measured: Mapping[str, Any], training: SamplingConfig) -> dict[str, Any]:
    """Reduce what was measured, also as an older version wrote it, to what a score depends on.

    Args:
        measured: settings of EvalConfig by their names, and more.
        training: gives the values that it leaves out.
    """
    greedy = measured.get("greedy")
    return {
        **measured,
        "samples": 1 if greedy else measured.get("samples"),
        "temperature": None if greedy else measured.get("temperature") or training.temperature,
        "max_new_tokens": measured.get("max_new_tokens") or training.max_new_tokens,
        # the hash of the problems has all else that a prompt is made of
        "data": {"system_prompt": measured.get("data", {}).get("system_prompt")},
    }


def read(path: Path) -> dict[str, Any]:
    """Read a best.json. Raises: ValueError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        named = _CHECKPOINT.fullmatch(content["checkpoint"])
        bests = [one for one in (content["best"], content["previous"]) if one is not None]
        data = content["measured"].get("data", {})
        if not named or not isinstance(data, dict) or content["best"] is None:
            raise ValueError("another kind of value")
        if any(type(Best(**one).step) is not int or one["score"] > 1 for one in bests):
            raise ValueError("another kind of step or score")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} must be as a run wrote it, got {error!r}: restore it, or delete it, and the "
            "search for the best checkpoint begins anew"
        ) from error
    return dict(content)


def resolved(weights: Path) -> Path:
    """Return the checkpoint that model.weights names, by its folder or by a run's best.json.

    Raises: ValueError for a best.json that is damaged, or whose checkpoint is gone.
    """
    if weights.name != FILE:
        return weights
    checkpoint = weights.parent / read(weights)["checkpoint"]
    if not checkpoint.is_dir():
        raise ValueError(
            f"model.weights must name a checkpoint that is there, got {weights}, which names "
            f"{checkpoint}: choose one of checkpoints/step_*"
        )
    return Path(checkpoint)
