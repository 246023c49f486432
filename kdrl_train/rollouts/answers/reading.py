"""Reads an answer whole, or refuses it.

Raises UnreadableError for what has no meaning, and for what has more than one.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from kdrl_train.rollouts.answers import values
from kdrl_train.rollouts.answers.comparing import (
    REALS,
    Answer,
    Value,
    equal_values,
    make_relation,
    make_set,
    meet,
)
from kdrl_train.rollouts.answers.expressions import FUNCTIONS, SHORT_WORDS, parse
from kdrl_train.rollouts.answers.names import is_of_unknowns, quantity, variable
from kdrl_train.rollouts.answers.numerals import based_number, with_digits
from kdrl_train.rollouts.answers.quantities import add_up, read_number
from kdrl_train.rollouts.answers.statement import MAX_ANSWER_CHARS
from kdrl_train.rollouts.answers.tokens import AnswerToken, UnreadableError, cut, plain_spelling
from kdrl_train.rollouts.answers.units import read_unit

MAX_DEPTH = 8
"""An answer with more open brackets at once is not read."""
MAX_WORDS = 4
"""An answer in more words is prose, which no completion would repeat."""

_PROSE = {"see", "proof", "prove", "above", "below", "vary", "varies", "exercise", "figure"}
_PROSE |= {"answer", "answers", "diagram", "graph", "omitted", "explanation"}
_MONTHS = {"january", "february", "march", "april", "may", "june", "july", "august", "september"}
_MONTHS |= {"october", "november", "december"}
_MATHEMATICS = FUNCTIONS | {"pi", "sqrt"}
_LETTER = re.compile(r"\(\s*([A-Z])\s*\)[.:]?|([A-Z])(?=\s*$)|([A-J])[.):](?=\s|$)")
_GOES_ON = re.compile(  # a letter that more of its expression or list follows; (E) -5 is choice E
    r"\s*(?:[=+*/^_(!,;<>]|and\b|or\b|\\text\{\s*(?:and|or)\b|\\(?:cup|in|le|ge|ne|setminus)\b)"
    r"|-|\s+-\s"
)
_LETTER_BEHIND = re.compile(r"((?:(?!\([A-J]\)|\bor\b|\\ne\b|\b[A-E],).)*[\d})%])\s+\(([A-E])\)")
_CHOICE = re.compile(r"^(?:\\text\{\s*)?(?i:option|choice|answer:?)\s*\}?\s*(?=\(?[A-J]\b)")
_LETTER_IN_TEXT = re.compile(
    r"\\text\{\s*(?:(?i:option|choice|answer:?)\s+)?(\(?[A-Z]\)?[.:)]?)\s*\}"
)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_UNCLEAR = (
    (re.compile(r"\^\s*\{?\s*(?:\\text\{\s*)?(?:st|nd|rd|th)\b"), "an ordinal is not read"),
    (re.compile(r"[ACP]_\{?\d+\}?\^\{?\d"), "C_5^2 may be a binomial coefficient or a power"),
    (re.compile(r"^\d{4}-\d\d-\d\d$"), "a date may be a difference"),
)
_RELATIONS = ("=", r"\in", "<", ">", r"\le", r"\ge", r"\ne", r"\approx")
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}
_OPENING, _CLOSING = ("(", "[", r"\{", "{", r"\langle"), (")", "]", r"\}", "}", r"\rangle")
_MATRICES = {"pmatrix", "bmatrix", "matrix", "smallmatrix"}
_CONSTANTS = {r"\reals": "reals", r"\emptyset": "empty set"}


@lru_cache(maxsize=4096)  # a gold answer is read once, not once per completion of its group
def read(text: str) -> Answer:
    """Read an answer. Raises: UnreadableError, which says what could not be read."""
    if len(text) > MAX_ANSWER_CHARS:
        raise UnreadableError(f"an answer must have at most {MAX_ANSWER_CHARS} characters")
    if _depth(text) > MAX_DEPTH:
        raise UnreadableError(f"an answer must have at most {MAX_DEPTH} brackets open at once")
    plain = _LETTER_IN_TEXT.sub(r"\1 ", plain_spelling(text)).strip()
    whole = _TEXT.fullmatch(plain)
    plain = _CHOICE.sub("", whole[1].strip() if whole else plain, count=1)
    for pattern, why in _UNCLEAR:
        if pattern.search(plain):
            raise UnreadableError(why)
    letter, behind = _LETTER.match(plain), _LETTER_BEHIND.fullmatch(plain)
    if letter is None and behind:
        value = _value(behind[1])
        if value.kind == "text":  # not (B)
            raise UnreadableError("a letter behind words may not be the choice")
        return Answer(behind[2], value)
    if letter is None or _GOES_ON.match(plain, letter.end()):
        return Answer(None, _value(plain))
    rest = plain[letter.end() :].strip()
    return Answer(letter[1] or letter[2] or letter[3], _value(rest) if rest else None)


def _depth(text: str) -> int:
    """Return the largest number of brackets, of any kind, that are open at once."""
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest


def _value(plain: str) -> Value:
    """Read what is left without the letter of a choice."""
    based = based_number(plain)
    if based:
        return based
    tokens = cut(with_digits(plain))
    if not tokens:
        raise UnreadableError("an answer must not be empty")
    return _text(tokens) or _listing(tokens)


def _text(tokens: Sequence[AnswerToken]) -> Value | None:
    """Read an answer in words: Monday, no solution, June 20; None where it is none."""
    words = _words(tokens)
    if not words or words[0].isdigit() or words[0] in _MATHEMATICS or {"and", "or"} & set(words):
        return None
    if len(words) == 1:
        word, is_text = words[0], tokens[0].kind == "text"
        if len(word) == 1 or (len(word) <= 3 and word not in SHORT_WORDS and not is_text):
            return None  # perhaps a product of variables
    elif not any(len(word) > 3 or word in SHORT_WORDS for word in words):
        return None
    if any(word.isdigit() for word in words) and words[0] not in _MONTHS:
        raise UnreadableError("words around a number may change it")
    if len(words) > MAX_WORDS or _PROSE & set(words):
        raise UnreadableError("an answer in words must be a name or a short phrase")
    is_reals = words in (["all", "real", "numbers"], ["all", "reals"])
    return Value("constant", "reals") if is_reals else Value("text", " ".join(words))


def _words(tokens: Sequence[AnswerToken]) -> list[str]:
    """Return the words and numbers of an answer in words, in small letters; [] for another one."""
    words: list[str] = []
    for token in tokens:
        if token.kind not in ("text", "word", "number") and token.text not in ("-", "'"):
            return []
        words += re.split(r"[\s'-]+", token.text.strip().strip(".").casefold())
    words = [word for word in words if word]
    return words if all(re.fullmatch(r"[a-z]+|\d+", word) for word in words) else []


def _with_depth(tokens: Sequence[AnswerToken]) -> Iterator[tuple[AnswerToken, bool]]:
    """Yield each token with whether it stands outside of all brackets, which count as outside.

    Raises: UnreadableError for brackets that do not close each other.
    """
    depth = 0
    for token in tokens:
        opens = token.text in _OPENING or (token.kind == "env" and token.text.startswith("begin"))
        closes = token.text in _CLOSING or (token.kind == "env" and not opens)
        is_bracket = token.kind in ("sign", "env")
        depth -= is_bracket and closes
        if depth < 0:
            raise UnreadableError("each bracket must be opened")
        yield token, depth == 0
        depth += is_bracket and opens
    if depth:
        raise UnreadableError("each bracket must be closed")


def _split(tokens: Sequence[AnswerToken], separators: Sequence[str]) -> list[list[AnswerToken]]:
    """Split at separators that stand outside of all brackets."""
    parts: list[list[AnswerToken]] = [[]]
    for token, is_outside in _with_depth(tokens):
        if is_outside and token.text.strip() in separators and token.kind != "number":
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _listing(tokens: Sequence[AnswerToken]) -> Value:
    """Read values with commas, "and" or "or" between them, as a set; or the only one."""
    parts = _split(tokens, (",", ";", "and", "or"))
    joined = any(token.text.strip() in ("and", "or") for token in tokens)
    if joined and len(parts) > 2 and not parts[-2]:
        del parts[-2]  # 1, 2, and 3
    if len(parts) == 1:
        return _element(parts[0])
    items = [_element(part) for part in parts]
    first = items[0]
    joints = {token.text.strip() for token, is_outside in _with_depth(tokens) if is_outside}
    one = _one_value(items, joints & {",", ";", "and", "or"})
    if one:
        return one
    if any(item.kind == "text" for item in items) and any(item.kind != "text" for item in items):
        raise UnreadableError("words and numbers must not be mixed in a list")
    if first.kind == "named" and all(item.kind == "number" for item in items[1:]):  # x = 1, 2
        return Value("named", first.tag, items=(make_set([first.items[0], *items[1:]]),))
    if {(item.kind, item.tag) for item in items} == {("named", first.tag)}:  # x = 1 or x = 2
        inner = [item.items[0] for item in items]
        intervals = all(one.kind == "group" for one in inner) and not first.tag.startswith("(")
        both = meet(*inner) if intervals and len(inner) == 2 and "or" not in joints else None
        if both:
            return Value("named", first.tag, items=(both,))
        either = Value("union", items=tuple(inner)) if intervals else make_set(inner)
        return Value("named", first.tag, items=(either,))
    return make_set(items)


def _one_value(items: Sequence[Value], joints: set[str]) -> Value | None:
    """Return the value of "1/2 or 0.5" and of "2 hours and 30 minutes"; None for a list."""
    numbers = all(item.kind == "number" for item in items)
    if joints == {"or"} and numbers and all(equal_values(item, items[0]) for item in items):
        return items[0]
    return add_up(items) if joints == {"and"} and numbers else None


def _element(tokens: Sequence[AnswerToken]) -> Value:
    """Read one value, equation or inequality."""
    outside = [token for token, is_outside in _with_depth(tokens) if is_outside]
    signs = [t.text for t in outside if t.kind == "sign" and t.text in _RELATIONS]
    if not signs:
        return _single(tokens)
    sides = _split(tokens, _RELATIONS)
    if signs == [r"\in"]:
        name, members = variable(sides[0]), _single(sides[1])
        if not name or members.kind not in ("set", "union", "group", "constant"):
            raise UnreadableError("a name must be an element of a set")
        return Value("named", name, items=(members,))
    if set(signs) == {"="}:
        return _equation(sides)
    if signs[-1] == r"\approx":
        return _approximation([*signs], sides)
    if len(signs) <= 2 and r"\ne" not in signs[1:] and "=" not in signs and r"\in" not in signs:
        return _inequality(signs, sides)
    raise UnreadableError("this chain of relations is not read")


def _equation(sides: Sequence[Sequence[AnswerToken]]) -> Value:
    """Read x = 5 and AB = 5 as a named value, 2 + 3 = 5 as its value, and else a relation.

    A relation keeps the number that it states of several unknowns, the 5 of x + y = 5.
    """
    names = [variable(side) or quantity(side) for side in sides]
    if len(sides) == 2 and names[1] and not names[0]:
        sides = sides[::-1]  # 5 = x
    members = [_single(side) for side in sides[1:]]
    last, name = members[-1], variable(sides[0])
    if not name and _is_constant(last):
        name = quantity(sides[0], of_matrix=last.kind != "number")
    if not all(equal_values(member, last) for member in members[:-1]):
        raise UnreadableError("the sides of an equation must be equal")
    if name:
        return Value("named", name, items=(last,))
    left, node = _single(sides[0]), last.node
    if equal_values(left, last):
        return last
    if not (left.node and node) or left.unit:
        raise UnreadableError("the sides of an equation must be equal")
    states = is_of_unknowns(left.node) and _is_constant(last)
    if last.unit and states:
        return Value("named", "".join(token.text for token in sides[0]), items=(last,))
    if last.unit or (len(members) > 1 and not states):
        raise UnreadableError("the sides of an equation must be equal")
    relation = make_relation("=", left.node, node)
    return replace(relation, items=(last,)) if states else relation


def _is_constant(value: Value) -> bool:
    """Say whether a value has no variables."""
    has_symbols = value.node is not None and bool(values.symbols(value.node))
    return not has_symbols and all(map(_is_constant, value.items))


def _approximation(signs: Sequence[str], sides: Sequence[Sequence[AnswerToken]]) -> Value:
    """Read 1/3 \\approx 0.333 as 1/3, and x \\approx 3.1 as a named value."""
    name = variable(sides[0]) or quantity(sides[0])
    if len(signs) == 1 and name:
        return Value("named", name, items=(_single(sides[1]),))
    if set(signs[:-1]) > {"="}:
        raise UnreadableError("this chain of relations is not read")
    exact = _equation(sides[:-1]) if len(sides) > 2 else _single(sides[0])
    inner, rounded = (exact.items[0] if exact.kind == "named" else exact), _single(sides[-1])
    if inner.node is None or rounded.node is None or inner.unit != rounded.unit:
        raise UnreadableError("only numbers can be close to each other")
    try:
        numbers = [values.compute(node, 80, {}) for node in (inner.node, rounded.node)]
    except (values.NoValueError, KeyError) as error:
        raise UnreadableError("only numbers can be close to each other") from error
    if abs(numbers[0] - numbers[1]) > abs(numbers[0]) * 0.01:
        raise UnreadableError("the two sides of an approximation must be close")
    return exact


def _inequality(signs: Sequence[str], sides: Sequence[Sequence[AnswerToken]]) -> Value:
    """Read x < 5 and 1 <= x < 5 as named intervals, and others as relations."""
    if signs[0] in (">", r"\ge") and len(signs) == 2:
        signs = [_FLIPPED[sign] for sign in reversed(signs)]
        sides = list(reversed(sides))
    names = [variable(side) for side in sides]
    infinity = Value("infinity", "+")
    if len(signs) == 2:
        if not names[1] or names[0] or names[2] or not set(signs) <= {"<", r"\le"}:
            raise UnreadableError("of a double inequality the middle must be a variable")
        low, high = _single(sides[0]), _single(sides[2])
        brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
        return Value("named", names[1], items=(Value("group", brackets, items=(low, high)),))
    (sign,) = signs
    if bool(names[0]) != bool(names[1]):
        if names[1]:
            sign, sides, names = _FLIPPED[sign], sides[::-1], names[::-1]
        bound = _single(sides[1])
        if bound.kind == "number" and bound.node and not values.symbols(bound.node):
            if sign == r"\ne":
                items = (REALS, make_set([bound], braces=True))
                return Value("named", names[0], items=(Value("group", "minus", items=items),))
            below = sign in ("<", r"\le")
            items = (replace(infinity, tag="-"), bound) if below else (bound, infinity)
            closed = sign in (r"\le", r"\ge")
            brackets = ("(]" if below else "[)") if closed else "()"
            return Value("named", names[0], items=(Value("group", brackets, items=items),))
    left, right = parse(sides[0]), parse(sides[1])
    if sign in (">", r"\ge"):
        sign, left, right = _FLIPPED[sign], right, left
    return make_relation(sign, left, right)


def _single(tokens: Sequence[AnswerToken]) -> Value:
    """Read a value without relations: a union, group, matrix, constant, text or number."""
    if not tokens:
        raise UnreadableError("a value is missing")
    for separators, kind, tag in (((r"\cup",), "union", ""), ((r"\setminus",), "group", "minus")):
        parts = _split(tokens, separators)
        if len(parts) > 1:
            return Value(kind, tag, items=tuple(_single(part) for part in parts))
    ratio = _split(tokens, (":",))
    if len(ratio) > 1:
        return _ratio(ratio)
    if len(tokens) > 2 and tokens[0].text in ("(", "[") and tokens[1].kind == "env":
        tokens = tokens[1:-1]
    if tokens[0].kind == "env":
        return _matrix(tokens)
    return _constant(tokens) or _group(tokens) or _text(tokens) or read_number(tokens)


def _constant(tokens: Sequence[AnswerToken]) -> Value | None:
    """Read infinity, the real numbers and the empty set; None for another value."""
    if len(tokens) == 1 and tokens[0].text in _CONSTANTS:
        return Value("constant", _CONSTANTS[tokens[0].text])
    signs = [token.text for token in tokens if token.text != "+"]
    if signs in ([r"\infty"], ["-", r"\infty"]):
        return Value("infinity", "-" if len(signs) == 2 else "+")
    return None


def _ratio(parts: Sequence[Sequence[AnswerToken]]) -> Value:
    """Read a ratio, or a time of day: 1:2, 10:30 a.m."""
    suffix = [token for token in parts[-1] if token.kind in ("text", "word")]
    last = [token for token in parts[-1] if token not in suffix]
    items = [read_number(part) for part in [*parts[:-1], last]]
    unit = read_unit(" ".join(token.text for token in suffix)) if suffix else None
    if any(item.unit for item in items) or (suffix and unit is None):
        raise UnreadableError("a ratio or a time of day must be of numbers")
    is_time = len(parts) == 2 and re.fullmatch(r"[0-5]\d", "".join(t.text for t in last))
    return Value("group", "time" if is_time else "::", unit=unit, items=tuple(items))


def _group(tokens: Sequence[AnswerToken]) -> Value | None:
    """Read a tuple, an interval or a set in braces; None where it is none of these."""
    opening, closing = tokens[0].text, tokens[-1].text
    outside = sum(is_outside for _, is_outside in _with_depth(tokens))
    if opening not in _OPENING or closing not in _CLOSING or outside > 2:
        return None
    if opening == r"\{" and closing == r"\}":
        built = _set_builder(tokens[1:-1])
        if built or len(tokens) == 2:
            return built or Value("constant", "empty set")
    items = [_element(part) for part in _split(tokens[1:-1], (",", ";"))]
    if opening == r"\{" and closing == r"\}":
        return make_set(items, braces=True)
    if len(items) < 2 or "{" in (opening, closing):
        is_list = len(items) > 1 and (opening, closing) == ("{", "}")  # LaTeX shows no braces
        return make_set(items) if is_list else None
    short = {r"\langle": "<", r"\rangle": ">"}
    brackets = short.get(opening, opening) + short.get(closing, closing)
    if brackets == "()" and [(i.kind, i.tag) for i in items] == [("infinity", s) for s in "-+"]:
        return Value("constant", "reals")
    return Value("group", brackets, items=tuple(items))


def _set_builder(tokens: Sequence[AnswerToken]) -> Value | None:
    r"""Read the inside of \{x : x > 2\} and \{x \in R | x > 2\}; None for another set."""
    parts = _split(tokens, (":", "|", r"\mid"))
    if len(parts) != 2:
        return None
    name, *numbers = _split(parts[0], (r"\in",))
    members = _listing(parts[1])
    is_real = not numbers or [token.text for token in numbers[0]] == [r"\reals"]
    if not is_real or members.kind != "named" or members.tag != variable(name):
        raise UnreadableError("a set must be of the numbers that one condition allows")
    return members.items[0]


def _matrix(tokens: Sequence[AnswerToken]) -> Value:
    """Read \\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix}."""
    name = tokens[0].text.removeprefix("begin{").rstrip("}")
    body = tokens[1:-1]
    if name not in _MATRICES or tokens[-1].text != f"end{{{name}}}":
        raise UnreadableError(f"{name!r} is not read alone")
    rows = [_split(row, ("&",)) for row in _split(body, ("\\\\",)) if row]
    if len({len(row) for row in rows}) != 1:
        raise UnreadableError("the rows of a matrix must have the same length")
    items = tuple(read_number(cell) for row in rows for cell in row)
    return Value("matrix", str(len(rows)), items=items)
