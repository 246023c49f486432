"""Reads numbers that are written in a base, and in words."""

import re
from fractions import Fraction
from itertools import dropwhile

from kdrl_train.rollouts.answers.comparing import Value
from kdrl_train.rollouts.answers.expressions import Node
from kdrl_train.rollouts.answers.tokens import UnreadableError
from kdrl_train.rollouts.answers.units import MULTIPLIERS, read_unit

_BASE = r"([0-9]{1,2}|[a-z]{3,8})"
_BASED = re.compile(
    r"[({]?([0-9][0-9A-Za-z]*|[0-9A-Z]{2,})[)}]?\s*"
    rf"(?:_\s*\{{?\s*\(?\s*(?:\\text\{{\s*)?(?:base\s*\}}?\s*)?{_BASE}\s*\}}?\s*\)?\s*\}}?"
    rf"|(?:\\text\{{)?\s*\(?\s*(?:in )?base[ -]\}}?\s*{_BASE}\)?\s*\}}?)"
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
_BASES |= {"ten": 10, "twelve": 12, "sixteen": 16}
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
)
_ONES += " sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBERS = {word: number for number, word in enumerate(_ONES.split())}
_NUMBERS |= {ten: 10 * i for i, ten in enumerate(_TENS.split(), start=2)}
_NUMBERS |= {
    f"{ten}-{one}": _NUMBERS[ten] + _NUMBERS[one]
    for ten in _TENS.split()
    for one in _ONES.split()[1:10]
}


def with_digits(plain: str) -> str:
    """Write the number of "twenty-five", "two million" and "three apples" in digits."""
    word, *others = plain.split() or [""]
    unit = " ".join(dropwhile(MULTIPLIERS.__contains__, others))
    if word.casefold() in _NUMBERS and (not unit or read_unit(unit)):
        return " ".join([str(_NUMBERS[word.casefold()]), *others])
    return plain


def based_number(plain: str) -> Value | None:
    """Read a number in a base: 101_2, 2F_{16}, 101 (base two); None for another answer."""
    match = _BASED.fullmatch(plain)
    if match is None:
        return None
    digits, base_name = match[1], match[2] or match[3]
    base = _BASES.get(base_name) or (int(base_name) if base_name.isdigit() else 0)
    if not 2 <= base <= 36:
        raise UnreadableError(f"a base must be from 2 to 36, got {base_name}")
    try:
        number = int(digits, base)
    except ValueError as error:
        raise UnreadableError(f"{digits} is no number in base {base}") from error
    node = Node("number", number=Fraction(number))
    return Value("number", node=node) if base == 10 else Value("based", str(base), node)
