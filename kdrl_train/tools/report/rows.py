"""Says which records of a run folder can be drawn; others are left out, and named."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from kdrl_train.runfolder.jsonl import Record

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)] | None
Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]


class SampleRow(TypedDict, total=False):
    """A line of samples/; an older run may lack some of its keys."""

    prompt: Required[str]
    completion: Required[str]
    token_chars: list[Count] | None
    teacher_log_ratio: list[Number] | None
    reward: Number
    rewards: dict[str, Number] | None
    advantage: Number
    kd_weight: Number
    outcome: str | None


class EventRow(TypedDict, total=False):
    """A line of events.jsonl."""

    step: Count
    event: str
    dropped: Count | None
    ranks: Count | None
    versions: dict[str, str] | None


STEP: TypeAdapter[Any] = TypeAdapter(dict[str, Number | list[Number]])
SAMPLE: TypeAdapter[Any] = TypeAdapter(SampleRow)
EVENT: TypeAdapter[Any] = TypeAdapter(EventRow)


def drawn(
    records: Iterable[Record], kind: TypeAdapter[Any], path: Path, damaged: Callable[[str], None]
) -> list[Record]:
    """Returns the records whose values are of a kind; `damaged` gets a message for each other."""
    kept = []
    for record in records:
        try:
            kind.validate_python(record)
            kept.append(record)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            damaged(f"a record of {path}, whose {first['loc'][0]!r:.80} is wrong: {first['msg']}")
    return kept
