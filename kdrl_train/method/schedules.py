"""Computes coefficients that change during a run, from the step and from what was logged.

A schedule keeps no state. What some kinds need of the past, the KL to the teacher and the
validation score of each step, is in the records of metrics.jsonl: a run adds each to its History as
it writes it, a resumed run rebuilds the History from the file. JSON keeps every digit of a
float, so both compute the same values to the bit.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from kdrl_train.method.config import MethodConfig, ScheduleConfig


@dataclass(slots=True)
class History:
    """What schedules read of the steps that are done, oldest first."""

    eval_every: int = 0
    """Steps between evaluations. One at another step, the last of a run that was continued later,
    does not count, since an uninterrupted run would not have made it."""
    kl: list[float | None] = field(default_factory=list)
    """kl_teacher of each step in nats per token; None where no token was distilled."""
    scores: list[float] = field(default_factory=list)
    """avg@k of each evaluation on the held-out problems."""
    teacher_kl: list[dict[str, float]] = field(default_factory=list)
    """Of each step: name of one of several teachers -> kl_teacher of the tokens it distilled."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Add one step's record of metrics.jsonl, as it was logged or read back."""
        kl, score = record.get("kl_teacher"), record.get("eval_avg_at_k")
        self.kl.append(kl if kl is not None and math.isfinite(kl) else None)
        of_teachers = ((k.removeprefix(OF_TEACHER), v) for k, v in record.items() if _is_kl(k, v))
        self.teacher_kl.append(dict(of_teachers))
        if self.eval_every and (record["step"] + 1) % self.eval_every == 0 and score is not None:
            self.scores.append(score)

    def of_teacher(self, name: str) -> "History":
        """Return what the schedule of one of several teachers reads: the KL to that teacher."""
        kl = [values.get(name) for values in self.teacher_kl]
        return History(self.eval_every, kl, self.scores)


OF_TEACHER = "kl_teacher/"
"""Begins the keys of the KL to each of several teachers, whose names follow."""


def _is_kl(key: str, value: Any) -> bool:
    """Whether an entry of a record is the KL to one of several teachers, and a number."""
    return key.startswith(OF_TEACHER) and value is not None and math.isfinite(value)


def rebuild_history(
    schedules: Mapping[str, ScheduleConfig],
    records: Iterable[Mapping[str, Any]],
    first_step: int,
    eval_every: int,
) -> History:
    """Rebuild the history of a run that starts at `first_step`, from its metrics.jsonl.

    Args:
        schedules: the run's schedules by their keys.
        records: as read_records gives them; those of first_step and later are left out.
        eval_every: of the run's config.
    Raises: ValueError where a schedule needs the records of all steps before and one is gone.
    """
    kept = [record for record in records if record["step"] < first_step]
    history = History(eval_every)
    for record in kept:
        history.add(record)
    for key, schedule in schedules.items():
        if schedule.reads_history and [record["step"] for record in kept] != list(
            range(first_step)
        ):
            raise ValueError(
                f"metrics.jsonl must hold steps 0 to {first_step - 1} to resume {key} of kind "
                f'"{schedule.kind}", got {len(kept)} records of them: restore the file, or start a '
                "new run with another --out"
            )
    return history


def schedule_value(schedule: ScheduleConfig, step: int, history: History | None = None) -> float:
    """Compute the value of a scheduled coefficient.

    Args:
        step: from 0.
        history: of the steps before this one; None will do for a schedule that reads none.
    Returns: the value for all groups; of reward_adaptive that of a group with p = 1/2.
    """
    done = min(step / schedule.steps, 1.0)
    if schedule.kind == "linear":
        return (1 - done) * schedule.initial + done * schedule.final
    if schedule.kind == "cosine":
        rest = (1 + math.cos(math.pi * done)) / 2
        return schedule.final + (schedule.initial - schedule.final) * rest
    if schedule.kind == "step":
        return (schedule.initial, *schedule.values)[bisect_right(schedule.at, step)]
    if schedule.kind == "switch":
        scores = history.scores if history is not None else []
        over = step >= schedule.steps or plateau(scores, schedule.patience, schedule.min_gain)
        return schedule.final if over else schedule.initial
    if schedule.kind == "kl_budget":
        assert history is not None
        assert len(history.kl) == step
        return budgeted(schedule, history.kl)
    return schedule.initial


def learning_rate(
    peak: float,
    warmup_steps: int,
    step: int,
    *,
    kind: Literal["constant", "linear", "cosine"] = "constant",
    final: float = 0.0,
    steps: int = 0,
) -> float:
    """Warm up linearly, peak · (step + 1) / warmup_steps, then keep the peak or go to `final`.

    linear, cosine: with done = (step - warmup_steps) / (steps - warmup_steps) the rate is final +
    (peak - final) · (1 - done), or · (1 + cos(pi · done)) / 2. So step warmup_steps still has the
    peak, and `final` would be that of step `steps`, the first one after the run.

    Args:
        step: from 0.
        steps: of the whole run.
    """
    if kind == "constant" or step < warmup_steps:
        return peak * min(1.0, (step + 1) / max(warmup_steps, 1))
    done = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    rest = 1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2
    return final + (peak - final) * rest


class ScheduledCoefs(NamedTuple):
    """The scheduled coefficients of a step."""

    kd: float
    """Beta, for a group with factor 1."""
    policy: float
    teachers: tuple[float, ...] = ()
    """Beta of each of several teachers by its number, in place of kd."""


def scheduled_coefs(
    method: MethodConfig,
    step: int,
    history: History | None = None,
    teachers: Sequence[str] = (),
) -> ScheduledCoefs:
    """Values of method.kd_coef and method.policy_coef at a step; history as schedule_value.

    teachers: the names of several teachers; empty: one beta holds for all problems.
    """
    return ScheduledCoefs(
        kd=schedule_value(method.kd_coef, step, history),
        policy=schedule_value(method.policy_coef, step, history),
        teachers=tuple(teacher_coef(method, name, step, history) for name in teachers),
    )


def teacher_coef(
    method: MethodConfig, name: str, step: int, history: History | None = None
) -> float:
    """Compute beta of one of several teachers: its schedule, which reads the KL to it, times its
    kd_weight."""
    history = None if history is None else history.of_teacher(name)
    schedule = method.of_teacher(name).kd_coef
    return method.kd_weight(name) * schedule_value(schedule, step, history)


def plateau(scores: Sequence[float], patience: int, min_gain: float) -> bool:
    """Whether `patience` scores in a row were at most min_gain above the best one before them.

    Once so, it stays so whatever follows. patience 0: never.
    """
    best, waited = -math.inf, 0
    for score in scores:
        if score > best + min_gain:
            best, waited = score, 0
        else:
            waited += 1
        if waited == patience > 0:
            return True
    return False


def budgeted(schedule: ScheduleConfig, kl: Sequence[float | None]) -> float:
    """Compute beta(s + 1) = beta(s) · (1 + gain · clip(KL(s) / target_kl - 1, -1, 1)), bounded.

    A KL above the target strengthens the teacher. A step without one (None) leaves beta as it was.
    Source: the adaptive KL controller of arXiv:1909.08593, section 2.2.
    """
    beta, (low, high) = schedule.initial, schedule.bounds
    for value in kl:
        if value is not None:
            error = min(max(value / schedule.target_kl - 1, -1.0), 1.0)
            beta = min(max(beta * (1 + schedule.gain * error), low), high)
    return beta
