"""Says which of several teachers teaches a problem, by a column of its record."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from kdrl_train.batch import Example
from kdrl_train.config import TrainConfig
from kdrl_train.config.models import DEFAULT_TEACHER, REFERENCE
from kdrl_train.rollouts.columns import NoColumnError, column_value


def teacher_of(place: str, record: Mapping[str, Any], column: str | None) -> str:
    """Return the name in a record's data.teacher_column; empty: the default teacher's.

    Raises: ValueError for a value that is no name.
    """
    value = None
    if column is not None:
        with suppress(NoColumnError):
            value = column_value(record, column)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"data.teacher_column {column!r} of {place} must hold the name of a teacher, or "
            f"nothing, got {value!r}: correct the record"
        )
    return (value or "").strip()


def require_teachers(examples: Sequence[Example], config: TrainConfig) -> None:
    """Raise ValueError unless each problem has a teacher, and some problem names one."""
    model, column = config.model, config.data.teacher_column
    if not model.teachers:
        return
    known = set(model.teacher_places) - {REFERENCE}
    for example in examples:
        if not example.teacher and model.teacher is None:
            raise ValueError(
                f"model.teacher must be set for problems that name no teacher, got {example.id}, "
                f"whose {column!r} is empty or missing: set model.teacher, or name one of "
                f"{', '.join(model.teachers)} there"
            )
        if example.teacher and example.teacher not in known:
            raise ValueError(
                f"data.teacher_column {column!r} of {example.id} must be a teacher of "
                f"model.teachers, {', '.join(model.teachers)}, got {example.teacher!r}: correct "
                "the record, or add that teacher"
            )
    if not any(example.teacher for example in examples):
        raise ValueError(
            f"data.teacher_column must be a column that names a teacher, got {column!r}, which is "
            f"empty or missing in all of {len(examples):,} problems: correct the column"
        )


def check_routing(examples: Sequence[Example], config: TrainConfig) -> str:
    """Count the problems of each teacher.

    Raises: UserWarning where a teacher has none: it is loaded, and never read.
    """
    counts = Counter(example.teacher or DEFAULT_TEACHER for example in examples)
    places = [name for name in config.model.teacher_places if name != REFERENCE]
    counted = ", ".join(f"{name} {counts[name]:,}" for name in places) + " problems"
    idle = [config.model.teacher_key(name) for name in places if not counts[name]]
    if idle:
        raise UserWarning(
            f"{', '.join(idle)} should teach some problem, got {counted}: leave it out, or "
            "correct data.teacher_column"
        )
    return counted
