"""Holds what an answer says, and decides which answers are equal."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from kdrl_train.rollouts.answers import values
from kdrl_train.rollouts.answers.expressions import SHORT_WORDS, Node
from kdrl_train.rollouts.answers.tokens import UnreadableError
from kdrl_train.rollouts.answers.units import Dimension, Unit

PLUS_MINUS = "±"
"""Tag of the set of two numbers that ± stands for."""
MAX_ITEMS = 100
"""Of a set; each is compared with each."""
VECTORS = {"()", "<>"}
"""Brackets of a tuple, which a column of a matrix equals as well."""
_PERCENT, _DEGREES, _RADIANS = (("percent", 1),), (("angle", 1),), (("radians", 1),)
_FACTORS: dict[tuple[Dimension, ...], Node] = {
    _PERCENT: Node("number", number=Fraction(1, 100)),
    _DEGREES: Node("div", (Node("pi"), Node("number", number=Fraction(180)))),
}
"""Dimension of a unit -> what a number with it is multiplied by to be one without it."""
_SUBSCRIPTED = re.compile(r"(\\?[A-Za-z]+)_\d+")


@dataclass(frozen=True, slots=True)
class Value:
    """What an answer says; `kind` tells which of the other fields it has."""

    kind: str
    """number (an expression), infinity, text, constant, based (a number in a base), set, union,
    matrix, relation, named (x = ...), or group (a tuple, interval or ratio)."""
    tag: str = ""
    """Words, name, base, rows of a matrix, sign of a relation or infinity, brackets of a group; of
    a number that was written in letters alone, these. A ratio has ::, and one such as 7:30 time."""
    node: Node | None = None
    """Of a number; of a relation left minus right side."""
    unit: Unit | None = None
    items: tuple["Value", ...] = ()
    """The parts; of a relation such as x + y = 5 the number that it states of several unknowns."""


REALS = Value("constant", "reals")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: a letter of a multiple choice, a value, or both."""

    letter: str | None
    value: Value | None


def make_set(items: Sequence[Value], *, braces: bool = False) -> Value:
    """Make a set of items, with both of ±; in braces each counts once, in a list as often as named.

    Raises: UnreadableError for more than MAX_ITEMS items.
    """
    flat = [part for x in items for part in (x.items if x.tag == PLUS_MINUS else (x,))]
    if len(flat) > MAX_ITEMS:
        raise UnreadableError(f"a set must have at most {MAX_ITEMS} items")
    if braces:
        kept: list[Value] = []
        for item in flat:
            kept += [] if any(equal_values(item, known) for known in kept) else [item]
        flat = kept
    return Value("set", items=tuple(flat))


def equal(stated: Answer, gold: Answer) -> bool:
    """Say whether two answers agree in all that both of them have: letter and value.

    Where the gold answer is a number, m + n = 113 states 113. As a gold answer it may be a line.
    """
    verdicts = []
    if stated.letter and gold.letter:
        verdicts.append(stated.letter == gold.letter)
    if stated.value and gold.value:
        states = stated.value.kind == "relation" and gold.value.kind == "number"
        value = stated.value.items[0] if states and stated.value.items else stated.value
        verdicts.append(equal_values(value, gold.value))
    return bool(verdicts) and all(verdicts)


def equal_values(a: Value, b: Value) -> bool:
    """Say whether two values are equal."""
    kinds = {a.kind, b.kind}
    if "relation" in kinds or (kinds == {"named"} and a.tag != b.tag):  # x = 2y is y = x/2
        return _equal_relations(_as_relation(a), _as_relation(b))
    if "named" in kinds:
        return equal_values(*(x.items[0] if x.kind == "named" else x for x in (a, b)))
    if len(kinds) == 2:
        return _equal_across(a, b)
    if a.kind == "number":
        return _equal_numbers(a, b)
    if a.kind in ("set", "union"):
        return _match(list(a.items), list(b.items))
    return _equal_parts(a, b)


def _equal_parts(a: Value, b: Value) -> bool:
    """Compare values of one kind part by part, in their order."""
    if a.node and b.node:  # numbers in a base
        return a.tag == b.tag and values.equal(a.node, b.node)
    same = (a.tag == b.tag or {a.tag, b.tag} == VECTORS) and len(a.items) == len(b.items)
    same = same and (a.unit == b.unit or not (a.unit and b.unit))
    return same and all(equal_values(x, y) for x, y in zip(a.items, b.items, strict=True))


def _equal_across(a: Value, b: Value) -> bool:
    """Say whether values of two kinds are equal: Tom as a name and as t · o · m, {5} and 5.

    x = 1, y = 2 is the tuple (1, 2), in the order of the letters, and a column of a matrix is one.
    """
    if {a.kind, b.kind} == {"number", "text"}:
        return a.tag.casefold() == b.tag.casefold()
    if a.kind == "number" and b.tag == "::":
        return _equal_ratio(a, b)
    if {a.kind, b.kind} == {"union", "group"}:
        holes = [_holes(x) for x in (a, b)]
        return None not in holes and _match(*map(list, holes))  # type: ignore[arg-type]
    for one, other in ((a, b), (b, a)):
        if one.kind == "set" and len(one.items) == 1:
            return equal_values(one.items[0], other)
        items = _coordinates(one)
        if items and other.kind == "group" and other.tag in VECTORS:
            return _equal_parts(Value("group", other.tag, items=items), other)
    return False


def _equal_ratio(stated: Value, gold: Value) -> bool:
    """Say whether a fraction is the gold ratio: 3/2 is 3:2.

    Where the gold answer is 1/4, 1:4 is not: it may be odds, or one part to another.
    """
    nodes = [item.node for item in gold.items if item.node]
    parts = [values.exact(node) for node in nodes]
    if len(nodes) != 2 or gold.unit or stated.unit or stated.node is None:
        return False
    first, second = (part if part and part.denominator == 1 else None for part in parts)
    if not first or not second or math.gcd(int(first), int(second)) != 1:
        return False
    return values.equal(stated.node, Node("div", tuple(nodes)))


def _holes(value: Value) -> tuple[Value, ...] | None:
    r"""Return the points that R \ {2}, or its union of open intervals, lacks; None for others."""
    if value.tag == "minus" and value.items[0] == REALS and value.items[1].kind == "set":
        return value.items[1].items
    pieces, edge, holes = list(value.items), Value("infinity", "-"), []
    if value.kind != "union" or any(piece.tag != "()" for piece in pieces):
        return None
    while pieces:
        place = next((i for i, x in enumerate(pieces) if equal_values(x.items[0], edge)), None)
        if place is None:
            return None
        edge = pieces.pop(place).items[1]
        holes.append(edge)
    return tuple(holes[:-1]) if edge == Value("infinity", "+") else None


def meet(a: Value, b: Value) -> Value | None:
    """Return the interval that x >= 2 and x < 5 is; None where the two do not meet."""
    for low, high in ((a, b), (b, a)):
        if low.items[1].kind == high.items[0].kind == "infinity":
            ends = low.items[0], high.items[1]
            nodes = [end.node for end in ends if end.node is not None]
            try:
                least, largest = (values.compute(node, values.DIGITS[0], {}) for node in nodes)
            except (values.NoValueError, KeyError, ValueError):
                return None
            if least.real < largest.real:
                return Value("group", low.tag[0] + high.tag[1], items=ends)
    return None


def _coordinates(value: Value) -> tuple[Value, ...]:
    """Return what x = 1, y = 2 or a matrix of one column has as coordinates; () for others."""
    if value.kind == "matrix" and value.tag == str(len(value.items)):
        return value.items
    names = [item.tag for item in value.items if item.kind == "named" and len(item.tag) == 1]
    if value.kind != "set" or not len(set(names)) == len(names) == len(value.items):
        return ()
    return tuple(item.items[0] for item in sorted(value.items, key=lambda item: item.tag))


def _match(a: list[Value], b: list[Value]) -> bool:
    """Say whether each value of one list equals one of the other, in any order."""
    if len(a) != len(b):
        return False
    a, b = _without_subscripts(a, b), _without_subscripts(b, a)
    for value in a:
        named = value.kind == "named"  # x = 1, y = 2 is not 1, 2
        others = enumerate(b)
        place = next(
            (i for i, x in others if (x.kind == "named") == named and equal_values(value, x)), None
        )
        if place is None:
            return False
        del b[place]
    return True


def _without_subscripts(values_: list[Value], others: list[Value]) -> list[Value]:
    """Return what x_1 = 5, x_2 = -5 names, where the others have no names; else the values."""
    letters = [_SUBSCRIPTED.fullmatch(x.tag) if x.kind == "named" else None for x in values_]
    is_one = len({letter[1] for letter in letters if letter}) == 1 and all(letters)
    if is_one and not any(other.kind == "named" for other in others):
        return [value.items[0] for value in values_]
    return list(values_)


def _equal_numbers(a: Value, b: Value) -> bool:
    """Compare expressions with their units.

    18 equals 18 inches; two units must convert into each other. 50% equals 50 and 1/2, and 90
    degrees equal 90 and pi/2; where 0.25 is the gold answer, it is 25% and not 0.25%.
    """
    assert a.node is not None
    assert b.node is not None
    if a.tag and b.tag:
        return a.tag == b.tag or (
            a.tag.casefold() == b.tag.casefold() and a.tag.casefold() in SHORT_WORDS
        )
    dimensions = {unit.dimensions for unit in (a.unit, b.unit) if unit}
    is_angle = dimensions == {_DEGREES, _RADIANS}
    if a.unit and b.unit and not is_angle:
        if a.unit.dimensions != b.unit.dimensions:
            return False
        return values.equal(_scaled(a.node, a.unit), _scaled(b.node, b.unit))
    if not is_angle and values.equal(a.node, b.node):
        number = values.exact(b.node)
        if not (_is_percent(a) and number and abs(number) < 1):
            return True
    for one, other in ((a, b), (b, a)):
        factor = _FACTORS.get(one.unit.dimensions) if one.unit else None
        if factor and values.equal(Node("mul", (one.node, factor)), other.node):  # type: ignore[arg-type]
            return True
    return False


def _is_percent(value: Value) -> bool:
    """Say whether a number is followed by a percent sign."""
    return value.unit is not None and value.unit.dimensions == _PERCENT


def _scaled(node: Node, unit: Unit) -> Node:
    """Return a number in the first unit of its dimension."""
    return node if unit.factor == 1 else Node("mul", (node, Node("number", number=unit.factor)))


def make_relation(sign: str, left: Node, right: Node) -> Value:
    """Make a relation. Raises: UnreadableError for one without a variable, which is false."""
    if not values.symbols(left) | values.symbols(right):
        raise UnreadableError("a relation between numbers must hold")
    minus = Node("mul", (Node("number", number=Fraction(-1)), right))
    difference = Node("add", (left, minus))
    if len(values.variants(difference)) > 1:
        raise UnreadableError("a relation with ± is not read")
    return Value("relation", sign, difference)


def _as_relation(value: Value) -> Value | None:
    """Return y = 2x as a relation, and relations as they are; None for other values."""
    if value.kind == "relation":
        return value
    if value.kind != "named" or value.items[0].node is None or value.items[0].unit:
        return None
    return make_relation("=", Node("symbol", name=value.tag), value.items[0].node)


def _equal_relations(a: Value | None, b: Value | None) -> bool:
    """Say whether one relation is a multiple of the other, for an inequality a positive one."""
    if a is None or b is None or a.tag != b.tag or a.node is None or b.node is None:
        return False
    try:
        ratio = values.ratio(a.node, b.node)
    except (values.NoValueError, KeyError):
        return False
    return ratio is not None and (ratio > 0 or a.tag in ("=", r"\ne"))


def spelling(answer: Answer) -> str:
    """Return one spelling for equal answers, by which completions vote."""
    parts = [f"({answer.letter})"] if answer.letter else []
    return " ".join(parts + ([_spelling(answer.value)] if answer.value else []))


def _spelling(value: Value) -> str:
    if value.kind == "number":
        assert value.node is not None
        is_word = value.tag and values.symbols(value.node)  # not pi
        return value.tag if is_word else values.spelling(value.node)
    if value.kind == "named":
        return _spelling(value.items[0])
    coordinates = value.items if value.tag in VECTORS else _coordinates(value)
    if coordinates:
        return f"vector [{', '.join(map(_spelling, coordinates))}]"
    items = [_spelling(item) for item in value.items if value.kind != "relation"]
    if value.kind in ("set", "union"):
        names = [f"{item.tag} = " * _has_own_name(item) for item in value.items]
        items = sorted(map("".join, zip(names, items, strict=True)))
        return f"{value.kind} [{', '.join(items)}]"  # ± 2 is 2, -2
    node = [values.spelling(value.node)] if value.node else []
    return f"{value.kind} {value.tag} [{', '.join(node + items)}]"


def _has_own_name(value: Value) -> bool:
    """Say whether a value is named, and not as one of several roots, x_1 and x_2."""
    return value.kind == "named" and not _SUBSCRIPTED.fullmatch(value.tag)


def check_values(answer: Answer) -> None:
    """Compute each number of an answer. Raises: UnreadableError where one has no value."""
    pending = [answer.value] if answer.value else []
    while pending:
        value = pending.pop()
        pending += value.items
        if value.node is not None:
            try:
                values.has_value(value.node)
            except values.NoValueError as error:
                raise UnreadableError(str(error)) from error
