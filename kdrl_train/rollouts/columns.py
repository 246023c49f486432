"""Reads the columns of a record: nested ones by dots, as text, as chat messages."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, time
from decimal import Decimal
from typing import Any

from kdrl_train.settings import nearest

_SPELLED = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")
"""How a text begins that spells chat messages."""


MISSING = ("", "nan", "NaN", "<NA>")
"""What programs write for a value that is not there, as pandas does into a .csv file."""


class NoColumnError(KeyError):
    """A record has no such column."""


def column_value(record: Mapping[str, Any], key: str) -> Any:
    """Return the value of a column, or of what is nested in one: "reward_model.ground_truth".

    A column whose name holds the dots comes first. A number leads into a list: "answers.0".

    Raises: NoColumnError, a KeyError, where the record has none.
    """
    if key in record:
        return record[key]
    for place in [i for i, letter in enumerate(key) if letter == "."][::-1]:
        with suppress(KeyError):  # also where a shorter name leads on
            return _inside(record[key[:place]], key[place + 1 :])
    raise NoColumnError(key)


def _inside(value: Any, key: str) -> Any:
    """Return what a nested key names in the value of a column."""
    if isinstance(value, Mapping):
        return column_value(value, key)
    head, _, rest = key.partition(".")
    if isinstance(value, (list, tuple)) and head.isdecimal() and int(head) < len(value):
        return _inside(value[int(head)], rest) if rest else value[int(head)]
    raise NoColumnError(key)


def column_names(record: Mapping[str, Any]) -> list[str]:
    """List the columns of a record, with those nested in them by their dotted names."""
    names = []
    for name, value in record.items():
        names.append(str(name))
        if isinstance(value, Mapping):
            names += [f"{name}.{inner}" for inner in column_names(value)]
    return sorted(names)


def plain(value: Any) -> Any:
    """Turn what parquet and numpy hold into dicts, lists, texts and numbers; other values stay."""
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if hasattr(value, "tolist"):  # an array or a scalar of numpy
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, Decimal):
        return format(value, "f")  # with all its digits
    return value.isoformat() if isinstance(value, (date, time)) else value


def text_of(place: str, record: Mapping[str, Any], key: str, column: str) -> str:
    """Return a column's value as text: 27.0 becomes "27"; only text and numbers are accepted, and
    no text of MISSING.

    Args:
        place: of the record, for messages.
        key: the setting that names the column, for messages.
    Raises: ValueError where the column is not in the record, or holds something else, or a float
        beyond 2^53 that may stand for another whole number.
    """
    value = value_of(place, record, key, column)
    if isinstance(value, float) and math.isfinite(value):
        if value.is_integer() and Decimal(repr(value)) != int(value):
            raise ValueError(
                f"{key} {column!r} of {place} must hold a text or a number whose digits are known, "
                f"got {value!r}, which a float rounds to {int(value)}: write it as text, or "
                "without a point and an exponent"
            )
        value = str(int(value)) if value.is_integer() else repr(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or value.strip() in MISSING:
        raise ValueError(
            f"{key} {column!r} of {place} must hold text or a number, got {value!r}: correct or "
            "remove the record, or name another column"
        )
    _require_unicode(place, key, column, value)
    return value


def value_of(place: str, record: Mapping[str, Any], key: str, column: str) -> Any:
    """Return a column's value; arguments as text_of. Raises: ValueError where there is none."""
    try:
        return column_value(record, column)
    except NoColumnError:
        names = column_names(record)
        raise ValueError(
            f"{key} must be a column of {place}, which has {names}, got "
            f"{column!r}{nearest(column, names)}: name one of these"
        ) from None


def messages_of(place: str, record: Mapping[str, Any], key: str, column: str) -> list[Any] | None:
    """Return a column's chat messages; None where it holds none. A text that spells them in JSON,
    as a cell of a .csv file does, holds them too.

    Each has a role and a text, content; the last one is the user's, which a completion replies to.

    Raises: ValueError, naming the record, for messages that a completion cannot follow.
    """
    value = value_of(place, record, key, column)
    if isinstance(value, str) and _SPELLED.match(value):
        try:
            value = json.loads(value)
        except ValueError as error:  # pandas writes Python's spelling
            raise ValueError(
                f"{key} {column!r} of {place} must hold text or messages in JSON, got a text that "
                f"begins as messages do: {error}: correct the record, or name another column"
            ) from error
    if not isinstance(value, list):
        return None
    messages = []
    for message in value:
        kept = {k: v for k, v in message.items() if v is not None} if _is_dict(message) else {}
        role, content = kept.get("role"), kept.get("content")
        if not (isinstance(role, str) and role and isinstance(content, str)):
            raise ValueError(
                f"{key} {column!r} of {place} must hold text or a list of messages, each with role "
                f"and content as text, got {message!r}: correct or remove the record, or name "
                "another column"
            )
        for text in (role, content):
            _require_unicode(place, key, column, text)
        messages.append(kept)
    last = messages[-1] if messages else {}
    if last.get("role") != "user" or not last["content"].strip():
        raise ValueError(
            f"{key} {column!r} of {place} must end with a message of the user, got "
            f"{last or 'no message'}: take what follows it out of the column, or correct the record"
        )
    return messages


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _require_unicode(place: str, key: str, column: str, text: str) -> None:
    """Raise ValueError for a text such as "\\ud800", as a tokenizer would not name the record."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key} {column!r} of {place} must be valid Unicode, got {error}: correct the record"
        ) from error
