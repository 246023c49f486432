"""Decides whether a run may start in a folder or resume it, and which settings may change then."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

from kdrl_train.config import EvalConfig, OptimConfig, TrainConfig
from kdrl_train.config.models import (
    BASE_FILE,
    DEFAULT_TEACHER,
    POLICY_FILE,
    SELF,
    is_url,
    teacher_file,
)
from kdrl_train.config_file import differences, load_yaml, to_dict, update
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.best import comparable
from kdrl_train.runfolder.checkpoint import Checkpoint, checkpoints, latest
from kdrl_train.runfolder.events import FILE as EVENTS
from kdrl_train.runfolder.log import read_postponed, read_records
from kdrl_train.runfolder.writable import require_writable

MAY_CHANGE = (
    "out",
    "resume",
    "allow_changes",
    "steps",
    "save_every",
    "save_async",
    "keep_checkpoints",
    "keep_every",
    "checkpoint_hashes",
    "samples_per_step",
    "eval",
    "log",
    "ranks",
    "teacher.head",
    "teacher.heads",
    "teacher.concurrency",
    "teacher.timeout_s",
    "teacher.deadline_s",
    "reward.workers",
    "reward.memory_bytes",
    "sampling.batch_size",
    "engine.url",
    "engine.timeout_s",
    "engine.memory_share",
    "engine.eager",
    "model.device",
    "model.attention",
    "model.gradient_checkpointing",
    "model.offload_policy",
    "model.offload_teacher",
    "model.move_teachers",
    "model.tensor_parallel",
    "model.weights",
    "engine.max_sampler_mismatch",
    "model.liger",
    "model.lora.merge",
    "model.trust_remote_code",
    "optim.micro_batch_tokens",
    "optim.workspace_bytes",
    "optim.head_impl",
)
"""Settings that a resumed run may change: they do not change what the training converges to."""


ALLOWED_ON_DEMAND = get_args(get_args(get_type_hints(TrainConfig)["allow_changes"])[0])
"""Settings that a resumed run may change where allow_changes names them."""


def _without(config: dict[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration without some dotted keys."""
    kept = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key not in keys:
            kept[name] = _without(value, keys, f"{key}.") if isinstance(value, dict) else value
    return kept


def _filled(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the default of each setting that came after it was written."""
    result = defaults | config
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(result[name], dict):
            result[name] = _filled(result[name], value)
    return result


def resumes(config: TrainConfig) -> bool:
    """Say whether a run continues what is in its folder. With "auto" it does if there is a run: one
    that was killed before its first checkpoint begins again, and says how many steps are lost."""
    if config.resume != "auto":
        return config.resume
    return (config.out / "config.yaml").exists() or bool(checkpoints(config.out / "checkpoints"))


def open_folder(config: TrainConfig) -> Checkpoint | None:
    """Return the checkpoint that a run continues from, and change nothing.

    Returns: None for a new run, and for one that was killed before its first checkpoint.
    Raises: ValueError for a used folder without resume, for resume in a folder without a run or
        with a run of another configuration, for a damaged checkpoint or log, and for a folder that
        cannot be written.
    """
    require_writable(config.out)
    newest = latest(config.out / "checkpoints")
    if config.resume:
        if newest is not None:
            check_config(newest.folder, newest.config, config)
        elif (config.out / "config.yaml").exists():
            check_config(config.out, load_yaml(config.out / "config.yaml"), config)
        else:
            raise ValueError(
                f"out must hold a run to resume, got {config.out}, which has neither a checkpoint "
                "nor a config.yaml: drop --resume, or correct --out"
            )
        check_log(config.out, 0 if newest is None else newest.step)
        return newest
    used = [n for n in ("config.yaml", "metrics.jsonl", "checkpoints") if (config.out / n).exists()]
    if used:
        raise ValueError(
            f"out must be a new folder, got {config.out}, which holds {', '.join(used)}: pass "
            "--resume to continue that run, or choose another --out"
        )
    return None


def check_log(folder: Path, first: int) -> None:
    """Check that no line of a run's log is damaged, and no record of a step before `first` lost.

    A metrics.jsonl that was moved away may lack all of them.

    Raises: ValueError naming the line, or the step.
    """
    path = folder / "metrics.jsonl"
    jsonl.read(folder / EVENTS)
    postponed = read_postponed(folder, first - 1)
    steps = [record["step"] for record in read_records(folder)]
    for number, (step, after) in enumerate(pairwise(steps), start=2):
        if after != step + 1:
            must = f"the record of step {step + 1}"
            raise ValueError(jsonl.damage(path, number, must, f"that of step {after}"))
    last = first - 1 if postponed is None else first - 2
    if steps and (steps[-1] < last or steps[0] > first):
        raise ValueError(
            f"{path} must hold the records of all steps up to {last}, got those of {steps[0]} to "
            f"{steps[-1]}: restore it from a copy, delete checkpoints/step_{first:06d} to repeat "
            "these steps from the checkpoint before, or move it away to go on without its records"
        )


def check_config(place: Path, written: dict[str, Any], config: TrainConfig) -> None:
    """Check that `config` may continue the run at `place`, whose configuration is `written`.

    Raises: ValueError naming the settings that differ, if any of them may not.
    """
    may_change = {*MAY_CHANGE, *config.allow_changes}
    if place != config.out and _knows_policy(config):
        may_change.add("model.policy")
    if any(schedule.waits_for_plateau for schedule in config.method.schedules.values()):
        may_change.remove("eval")  # its scores decide when the schedule switches
    models = written.get("model", {})
    before = {DEFAULT_TEACHER: models.get("teacher")} | models.get("teachers", {})
    for name, now in config.model.teacher_places.items():
        said = (config.out / teacher_file(name)).exists()  # it says which model it must be
        if said and name in before and is_url(before[name]) == is_url(now):
            may_change |= {config.model.teacher_key(name), config.teacher.name_key(name)}
    if SELF in (before[DEFAULT_TEACHER], config.model.teacher):
        may_change -= {"model.teacher", "model.weights"}  # which the teacher is made of
    reward = {"function": "math"} | written.get("reward", {})
    builtin = reward["function"] in ("math", "exact")  # they pay 0 or 1
    # a run without this setting called every reward above 0 right
    written = written | {"reward": {"right_above": 0.5 if builtin else 0.0} | reward}
    written = _filled(written, to_dict(TrainConfig()))
    changed = differences(_without(written, may_change), _without(to_dict(config), may_change))
    if changed:
        lines = [f"  {key}: {old} before, {new} now" for key, (old, new) in changed.items()]
        allowed = [key for key in changed if key in ALLOWED_ON_DEMAND]
        remedy = f", or pass --allow-changes {' '.join(allowed)}" if allowed else ""
        raise ValueError(
            f"a resumed run must keep the settings of {place}, got other values:\n"
            + "\n".join(lines)
            + f"\nset them back{remedy}, or start a new run with another --out"
        )


def _knows_policy(config: TrainConfig) -> bool:
    """Say whether a run with a checkpoint knows its policy by more than its name: the checkpoint
    has the trained weights, and files of the folder describe what else comes from model.policy."""
    models, places = config.model, config.model.teacher_places
    frozen = models.self_teacher == "frozen"
    files = [teacher_file(name) for name, place in places.items() if frozen and place == SELF]
    if not all((config.out / name).exists() for name in (POLICY_FILE, *files)):
        return False
    return not models.lora.rank or base_hash(config.out) is not None


def base_hash(folder: Path) -> str | None:
    """Read the hash of the weights under a run's adapters; None where its folder has none.

    Raises: ValueError for a file that is damaged.
    """
    path = folder / BASE_FILE
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} must be readable JSON, got {error}: restore it, or, where model.policy is "
            "unchanged, delete it"
        ) from error
    weights = described.get("weights") if isinstance(described, dict) else None
    return weights if isinstance(weights, str) else None


def changed_rate(checkpoint: Checkpoint, config: TrainConfig) -> str | None:
    """Say from which step on the learning rate is another one than a checkpoint's run would have
    had, and which settings make it so; None: none does."""
    names = [key.removeprefix("optim.") for key in ALLOWED_ON_DEMAND]
    written = checkpoint.config.get("optim", {})
    old = update(OptimConfig(), {name: written[name] for name in names if name in written})
    steps = checkpoint.config.get("steps", config.steps)
    first = checkpoint.step
    for step in range(first, config.steps):
        before, now = old.rate_at(step, steps), config.optim.rate_at(step, config.steps)
        if before != now:
            pairs = [(f"optim.{n}", getattr(old, n), getattr(config.optim, n)) for n in names]
            pairs.append(("steps", steps, config.steps))
            changes = ", ".join(f"{key} {a} -> {b}" for key, a, b in pairs if a != b)
            return f"learning rate changed from {before:g} to {now:g} at step {step + 1}: {changes}"
    return None


def changed_evaluation(checkpoint: Checkpoint, config: TrainConfig) -> str | None:
    """Say which settings make scores of held-out problems other ones than a checkpoint's run had;
    None: none does, or one of the two measures nothing. check_data compares the problems."""
    before, now = checkpoint.config.get("eval", {}), to_dict(config.eval)
    before = _filled(before, to_dict(EvalConfig()))
    if not (before["every"] and before["data"]["path"] and config.eval.sections):
        return None
    old, new = (comparable(one, config.sampling) for one in (before, now))
    names = ("samples", "greedy", "temperature", "max_new_tokens")
    differ = [n for n in names if before[n] != now[n] and old[n] != new[n]]
    changed = [f"eval.{name} {before[name]} -> {now[name]}" for name in differ]
    if not changed:
        return None
    return f"scores before and after do not compare: {', '.join(changed)}"


def check_data(
    checkpoint: Checkpoint, data: dict[str, dict[str, Any]], config: TrainConfig
) -> list[str]:
    """Check that a run goes on with the problems it has learnt from: a step's are chosen by place.

    Args:
        data: which problems the run has now, as in RunState.
    Returns: what to warn of: other held-out problems, and a checkpoint that does not say.
    Raises: ValueError for other problems; for other held-out ones where a schedule waits for their
        scores.
    """
    if not checkpoint.data:
        return [
            f"{checkpoint.folder} does not say which problems the run had, as it was saved by an "
            f"older version: make sure that {config.data.path} has not changed since"
        ]
    warnings = []
    for section, now in data.items():
        before = checkpoint.data.get(section)
        if before is None or before == now:
            continue
        changed = f"{now['count']:,} in place of {before['count']:,}"
        if now["count"] == before["count"]:
            changed = f"{now['count']:,}, not all of them the same or in the same place"
        message = (
            f"{section}.path must hold the problems that it held at {checkpoint.folder}, in the "
            f"same order and chat template, got {changed}"
        )
        waits = any(one.waits_for_plateau for one in config.method.schedules.values())
        if section == "data" or (section == "eval.data" and waits):
            raise ValueError(
                f"{message}: restore them, or start a new run with another --out, from these "
                f"weights with --model.weights {checkpoint.folder}"
            )
        warnings.append(f"{message}: scores before and after do not compare")
    return warnings
