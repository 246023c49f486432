"""Reads an expression together with its unit, its currency, or a word such as million."""

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from kdrl_train.rollouts.answers import values
from kdrl_train.rollouts.answers.comparing import PLUS_MINUS, Value
from kdrl_train.rollouts.answers.expressions import FUNCTIONS, Node, parse
from kdrl_train.rollouts.answers.tokens import AnswerToken, UnreadableError
from kdrl_train.rollouts.answers.units import MULTIPLIERS, Unit, read_unit

_CURRENCIES = {r"\dollars": "dollar", r"\euro": "euro", r"\pounds": "GBP", r"\yen": "yen"}
_UNIT_SIGNS = {"%": "percent", r"\degree": "degree", ".": "", **{sign: sign for sign in "/^{}23"}}
_EXPONENT = re.compile(r"\s*\^\s*\{?\s*([23])\s*\}?")


def read_number(tokens: Sequence[AnswerToken]) -> Value:
    """Read an expression with its unit or currency."""
    tokens = list(tokens)
    currency = next((i for i, t in enumerate(tokens[:2]) if t.text in _CURRENCIES), None)
    unit, name = None, ""
    if currency is not None and (currency == 0 or tokens[0].text in ("-", "+")):
        name = _CURRENCIES[tokens.pop(currency).text]
    elif tokens and tokens[-1].text in _CURRENCIES:
        name = _CURRENCIES[tokens.pop().text]
    if name:
        unit = read_unit(name)
    tokens, suffix, multiplier = _without_unit(tokens, name)
    if unit and suffix and (suffix.dimensions[0][0] in ("percent", "angle")):
        raise UnreadableError("a price has no percent and no degrees")
    node = parse(tokens)
    if multiplier != 1:
        node = Node("mul", (node, Node("number", number=Fraction(multiplier))))
    letters = "".join(t.text for t in tokens if t.kind in ("word", "text"))
    tag = letters if len(tokens) == 1 and len(letters) > 1 else ""
    nodes = values.variants(node)
    unit = suffix or unit
    if len(nodes) == 2:
        both = tuple(Value("number", node=one, unit=unit) for one in nodes)
        return Value("set", PLUS_MINUS, items=both)
    return Value("number", tag, node, unit)


def add_up(parts: Sequence[Value]) -> Value | None:
    """Return the sum of 2 hours and 30 minutes; None where each unit is not a smaller one."""
    total, (first, *others) = parts[0].node, [part.unit for part in parts]
    if first is None or total is None:
        return None
    for part, unit, larger in zip(parts[1:], others, [first, *others], strict=False):
        if not (unit and larger and part.node and unit.dimensions == first.dimensions):
            return None
        if unit.factor >= larger.factor:
            return None
        share = Node("number", number=unit.factor / first.factor)
        total = Node("add", (total, Node("mul", (part.node, share))))
    return Value("number", node=total, unit=first)


def _without_unit(
    tokens: list[AnswerToken], currency: str
) -> tuple[list[AnswerToken], Unit | None, int]:
    """Cut the longest unit off the end, and words such as million before it.

    A single letter outside of \\text{} is a variable. A degree behind a function belongs to its
    argument. A price may end in "per hour".

    Returns: the other tokens, the unit, and what the number is multiplied by.
    """
    has_function = any(token.text.removeprefix("\\") in FUNCTIONS for token in tokens)
    for start in range(1, len(tokens)):
        words, multiplier = (_phrase(tokens[start:]) or "").split(), 1
        while words and words[0] in MULTIPLIERS:
            multiplier *= MULTIPLIERS[words.pop(0)]
        is_rate = currency and words and words[0] in ("per", "/")
        unit = read_unit(" ".join([currency, *words] if is_rate else words))
        is_argument = has_function and "degree" in words
        if not is_argument and (unit or (multiplier > 1 and not words)):
            return tokens[:start], unit, multiplier
    return tokens, None, 1


def _phrase(tokens: Sequence[AnswerToken]) -> str | None:
    """Return the text of tokens that may be a unit; None where they cannot."""
    fraction = [token.text for token in tokens[:5] if token.kind == "sign"]
    if fraction == [r"\frac", "{", "}", "{"] and tokens[-1].text == "}":  # \frac{\text{m}}{...}
        tokens = [tokens[2], AnswerToken("sign", "/"), *tokens[5:-1]]
    words = []
    for before, token in pairwise([AnswerToken("end", ""), *tokens]):
        is_variable = token.kind == "word" and len(token.text) == 1
        if is_variable and before.text not in ("/", r"\degree"):
            return None
        if token.kind in ("text", "word"):
            words.append(token.text)
        elif token.text in _UNIT_SIGNS:
            words.append(_UNIT_SIGNS[token.text])
        else:
            return None
    return _EXPONENT.sub(r"^\1", " ".join(words))
