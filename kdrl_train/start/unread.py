"""Names the settings of a run that change nothing, beside its others, before the first step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from kdrl_train.config import TrainConfig
from kdrl_train.config.models import REFERENCE, SELF, is_url
from kdrl_train.config_file import differences, to_dict
from kdrl_train.method.config import MethodConfig
from kdrl_train.model.self_teacher import has_no_copy
from kdrl_train.rollouts.records import SUFFIXES

When = Callable[[TrainConfig], bool]

RULES: tuple[tuple[str, When, str], ...] = (
    (
        "method.kd is None",
        lambda c: c.method.kd is None,
        "model.teacher model.self_teacher model.ema_decay model.teachers model.move_teachers "
        "model.teacher_api model.offload_teacher teacher data.teacher_column data.teacher_template "
        "data.max_teacher_prompt_tokens method.kd_coef method.kd_mask method.teachers "
        "method.kd_eos method.jsd_alpha",
    ),
    (
        "no teacher is behind a URL",
        lambda c: not c.model.teacher_servers,
        "teacher model.teacher_api",
    ),
    (
        "model.teacher is not behind a URL",
        lambda c: not c.model.teacher_is_url,
        "teacher.head teacher.name",
    ),
    (
        'model.teacher_api is "kdrl"',
        lambda c: c.model.teacher_api == "kdrl",
        "teacher.name teacher.names",
    ),
    (
        "method.kd reads no whole distribution",
        lambda c: not c.method.is_exact,
        "teacher.head teacher.heads",
    ),
    (
        "no teacher has a copy of weights in this process",
        lambda c: not _has_copies(c),
        "model.move_teachers model.offload_teacher",
    ),
    ("each teacher has its own", lambda c: _all_set(c, "kd_coef"), "method.kd_coef"),
    ("each teacher has its own", lambda c: _all_set(c, "kd_mask"), "method.kd_mask"),
    (
        'method.kd is not "jsd" or "topk_jsd"',
        lambda c: c.method.kd not in ("jsd", "topk_jsd"),
        "method.jsd_alpha",
    ),
    (
        'method.policy is "off"',
        lambda c: c.method.policy == "off",
        "method.policy_coef method.advantage method.std_floor method.clip_low method.clip_high",
    ),
    (
        "every ratio is 1 in the only update of a step",
        lambda c: c.method.policy != "off" and _starts_at_one(c),
        "method.policy method.clip_low method.clip_high",
    ),
    (
        'method.policy is "none"',
        lambda c: c.method.policy == "none",
        "method.clip_low method.clip_high",
    ),
    (
        'method.advantage is not "grpo"',
        lambda c: c.method.advantage != "grpo",
        "method.std_floor",
    ),
    (
        'method.sampler_correction is "none"',
        lambda c: c.method.sampler_correction == "none",
        "method.sampler_cap",
    ),
    (
        'model.head_backward is "exact"',
        lambda c: c.model.head_backward == "exact",
        "model.head_threshold model.head_flat",
    ),
    (
        "the loss of method.loss cannot be split",
        lambda c: c.method.loss is not None,
        "log.diagnostics_every",
    ),
    (
        'optim.head_impl is "reference"',
        lambda c: c.optim.head_impl == "reference",
        "optim.workspace_bytes",
    ),
    (
        'engine.kind is not "vllm_server"',
        lambda c: c.engine.kind != "vllm_server",
        "engine.timeout_s",
    ),
    (
        'engine.kind is not "vllm"',
        lambda c: c.engine.kind != "vllm",
        "engine.memory_share engine.eager",
    ),
    ("eval.data.path is empty", lambda c: not c.eval.data.path, "eval"),
    ("eval.every is 0, so that only the command eval reads it", lambda c: not c.eval.every, "eval"),
    ("eval.greedy draws nothing", lambda c: c.eval.greedy, "eval.samples"),
    (
        "log.trackers has neither wandb nor trackio",
        lambda c: not {"wandb", "trackio"} & set(c.log.trackers),
        "log.project",
    ),
    ("no run is resumed", lambda c: not c.resume, "allow_changes"),
)
"""Why nothing reads some settings, when that is so, and their keys; a section is all of its own."""

READ_BY = {
    "constant": {"initial"},
    "linear": {"initial", "final", "steps"},
    "cosine": {"initial", "final", "steps"},
    "step": {"initial", "at", "values"},
    "switch": {"initial", "final", "steps", "patience", "min_gain"},
    "kl_budget": {"initial", "target_kl", "gain", "bounds"},
    "reward_adaptive": {"initial"},
}
"""Kind of a schedule -> what it reads of its settings."""


def unread(config: TrainConfig, launched: bool = True) -> list[str]:
    """Say which settings have another value than their default and change nothing, and why.

    In a file they are no error: it may hold what an option has switched off. The command line
    refuses them as options.

    launched: whether torchrun has started the run.
    """
    return sentences(_changed(config), reasons(config, launched))


def reasons(config: TrainConfig, launched: bool = True) -> dict[str, str]:
    """Return why nothing reads some settings that have another value than their default, by key.

    launched: as in `unread`. The options of a run may be the same with and without torchrun, so
        the command line takes those of ranks.
    """
    rules = [(reason, keys.split()) for reason, holds, keys in RULES if holds(config)]
    if not launched:
        rules.append(("torchrun has not started this run", ["ranks"]))
    return idle(_changed(config), [*rules, *_of_schedules(config.method), *_of_problems(config)])


def idle(settings: Mapping[str, Any], rules: Iterable[tuple[str, Sequence[str]]]) -> dict[str, str]:
    """Return why nothing reads some of the settings, by key.

    rules: a reason that holds, and the keys that nothing reads then; a section is all of its own.
        Of several the first one counts.
    """
    said: dict[str, str] = {}
    for reason, keys in rules:
        for key in settings:
            if any(f"{key}.".startswith(f"{one}.") for one in keys):
                said.setdefault(key, reason)
    return said


def sentences(settings: Mapping[str, Any], why: Mapping[str, str]) -> list[str]:
    """Write a sentence for each reason, with its settings and their values."""
    values: dict[str, list[str]] = {}
    for key, reason in why.items():
        values.setdefault(reason, []).append(f"{key} = {settings[key]}")
    return [f"nothing reads {', '.join(some)}, as {reason}" for reason, some in values.items()]


def check_settings(texts: Sequence[str]) -> str:
    """Raise UserWarning with what `unread` has said, for the preflight."""
    raise UserWarning("; ".join(texts))


def changed(config: Any) -> dict[str, Any]:
    """Return each setting that has another value than its default, by its key."""
    both = differences(to_dict(type(config)()), to_dict(config))
    return {key: now for key, (_, now) in both.items() if not isinstance(now, dict)}


def _changed(config: TrainConfig) -> dict[str, Any]:
    """Return what `changed` does, with what stands in mappings compared key by key."""
    settings = changed(config)
    parts: list[tuple[str, Any]] = [
        *((f"eval.sets.{name}", data) for name, data in config.eval.sets.items()),
        *((f"method.teachers.{name}", one) for name, one in config.method.teachers.items()),
    ]
    parts += [(f"{key}.kd_coef", one.kd_coef) for key, one in parts if key.startswith("method.")]
    for key, one in parts:
        if one is not None:
            settings |= {f"{key}.{name}": now for name, now in changed(one).items()}
    return settings


def _of_schedules(method: MethodConfig) -> Iterator[tuple[str, list[str]]]:
    """Yield what each schedule does not read, and why."""
    for key, schedule in method.schedules.items():
        idle = {field.name for field in fields(schedule)} - READ_BY[schedule.kind] - {"kind"}
        if schedule.final == schedule.initial:  # as a file says it that means a constant
            idle.discard("final")
        yield f"{key}.kind is {schedule.kind}", [f"{key}.{name}" for name in idle]
        if schedule.kind == "switch" and not schedule.patience:
            yield f"{key}.patience is 0", [f"{key}.min_gain"]


def _of_problems(config: TrainConfig) -> Iterator[tuple[str, list[str]]]:
    """Yield what is not read of each set of problems, and why."""
    sets = {f"eval.sets.{name}": one for name, one in config.eval.sets.items()}
    for section, data in {"data": config.data, "eval.data": config.eval.data, **sets}.items():
        if data.path.endswith(SUFFIXES):
            yield f"{section}.path names a file", [f"{section}.split"]
        if data.teacher_template is None:
            reason = f"{section}.teacher_template is None"
            yield reason, [f"{section}.max_teacher_prompt_tokens"]
        if section != "data":
            yield "no teacher reads held-out problems", [f"{section}.teacher_column"]


def _all_set(config: TrainConfig, name: str) -> bool:
    """Whether each of several teachers has its own value of a setting of method.teachers."""
    names = set(config.model.teacher_places) - {REFERENCE} if config.model.teachers else set()
    values = (getattr(config.method.teachers.get(one), name, None) for one in names)
    return bool(names) and all(value is not None for value in values)


def _has_copies(config: TrainConfig) -> bool:
    """Whether weights of a teacher are held in this process beside the policy's."""
    places = config.model.teacher_places.values()
    return any(
        not is_url(place) and not (place == SELF and has_no_copy(config.model)) for place in places
    )


def _starts_at_one(config: TrainConfig) -> bool:
    """Whether completions are used once, and their ratio is taken to the weights that use them."""
    stale = config.engine.staleness and config.method.sampler_correction == "none"
    return config.optim.updates_per_rollout == 1 and not stale
