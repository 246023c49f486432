r"""Finds the boxes of a text, \boxed{} and \fbox{}, and the answer that the last ones hold."""

import re
from collections.abc import Iterator
from itertools import pairwise

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_NUMERAL = r"\d\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u218f"
_TIMES = r"\\(?:times|cdot|div)(?![a-z])|[\u00d7\u00b7\u00f7\u22c5]"
_GOES_ON_BEFORE = re.compile(
    rf"(?:[{_NUMERAL}+/^\u2212\u2013\u221a-\u221c\u03c0-]"
    rf"|(?:{_TIMES}|\\(?:pi|pm|mp|over|choose)|\u00b1)\s*"
    r"|(?:\\(?:sqrt(?:\s*\[[^\]]*\])?|[dtc]?frac(?:\s*\{(?:[^{}]|\{[^{}]*\})*\})?|[dt]?binom)|\^)"
    r"\s*\{?\s*"
    r"|_\s*\{\s*|[\w)}$]\s*\+\s+|[=$][^\n=$]*[\d)}]\s+[-\u2212]\s+"
    r"|\\(?:ln|log|exp|(?:arc)?(?:sin|cos|tan))(?:_\w|_\{\w+\})?\s*\(?"
    r"|[\w)}$] +\* *|\d\*|[\w)}$] */ +|(?:\\n(?:e|eq|ot\s*=)|\u2260|!=)\s*"
    r"|\b(?i:not|half(?: of)?|twice|thrice|times|plus|minus|negative|at (?:least|most)"
    r"|(?:more|less|fewer|greater) than)[\s$]+)\Z"
)
_GOES_ON_BEHIND = re.compile(
    rf"[{_NUMERAL}\u221a-\u221c\u03c0]|[a-z](?![a-z])|[/+=@&_-](?=[0-9\\(]|[a-z](?![a-z]))"
    rf"|\s*\^(?!\s*\{{?\s*\\circ)|\s*\\(?:frac|pi|sqrt|over|choose)(?![a-z])|\s*(?:{_TIMES})\s*[0-9(\\]"
    r"|_\{|!\s*(?:\$|\\[)\]])|\s*\+\s*[\w(\\$]|\s*[*/]\s*[0-9]|\s+[-\u2212]\s+[0-9]"
    r"|\s*\\[lc]?dots|\s*(?:\\text\{\s*)?or (?:more|less|fewer|greater)\b"
    r"|\s*(?:\\text\{\s*)?(?:dozen|hundred|thousand|[mbtr]+illion)\b",
    re.IGNORECASE,
)
r"""A box is read alone where words or units follow it, and the degrees of \boxed{90}^\circ."""
_OPENING = re.compile(r"(?:\\left\s*)?(?<!\\)\(\s*\Z")
_CLOSING = re.compile(r"\s*(?:\\right\s*)?\)")
_SPACE = r"(?:[\s$~]|\\(?:[,;:! ]|q?quad\b))*"
_BOX = r"\\(?:boxed|fbox)\s*\{"
_LEFT_SIDE = r"([A-Za-z](?:_\{?\w\}?)?\s*=)"
_BETWEEN = re.compile(  # what joins two boxes to one answer: \boxed{2} and \boxed{3}
    rf"{_SPACE}(?:[,;]?{_SPACE}(?:\\text\{{\s*)?\b(and|or)\b\s*\}}?|[,;]){_SPACE}"
    rf"{_LEFT_SIDE}?{_SPACE}{_BOX}"
)
_BESIDE = re.compile(_BOX)
_BEFORE = re.compile(rf"(?<![\w\\]){_LEFT_SIDE}{_SPACE}\Z")
_MAX_BETWEEN = 60
"""Of two boxes with more characters between them each is an answer of its own."""
_MAX_BOXES = 20
"""Of one answer."""


def boxed_answer(text: str) -> tuple[bool, str | None]:
    r"""Return whether a text has a box, and what the last one holds.

    Boxes with a comma, "and" or "or" between them are one answer: \boxed{2} or \boxed{3} is 2 or 3.
    The answer is None where the box is a part of an expression, as in \boxed{5}^2.
    """
    spans = _last_boxes(text)
    if not spans:
        return False, None
    (start, _), (_, end) = spans[0], spans[-1]
    first = text.rindex("\\", 0, start)
    before, behind = text[max(0, first - 40) : first], text[end + 1 : end + 100]
    if _goes_on(before, behind):
        return True, None
    contents = [text[start:end].strip() for start, end in spans]
    return True, contents[0] if len(contents) == 1 else _joined(
        text, spans, contents, before, behind
    )


def box_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the content of each closed box."""
    open_braces: list[int | None] = []  # start of a box's content; None: any other brace
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                yield start, token.start()
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:  # \boxed{, not the escaped \{
            open_braces.append(token.end())


def _goes_on(before: str, behind: str) -> bool:
    r"""Say whether boxes are a part of an expression, also in brackets, as in 2(\boxed{3})."""
    while not (_GOES_ON_BEFORE.search(before) or _GOES_ON_BEHIND.match(behind.lstrip("$"))):
        opening, closing = _OPENING.search(before), _CLOSING.match(behind)
        if not (opening and closing):
            return False
        before, behind = before[: opening.start()], behind[closing.end() :]
    return True


def _last_boxes(text: str) -> list[tuple[int, int]]:
    """Return the span of the last box, the innermost of nested ones, and of those joined to it."""
    spans = sorted(box_spans(text))
    last = spans[-1:]
    for span in spans[-2 : -_MAX_BOXES - 1 : -1]:
        begin, end = span[1] + 1, last[-1][0]
        if end - begin > _MAX_BETWEEN or not (
            _BETWEEN.fullmatch(text, begin, end) or _BESIDE.fullmatch(text, begin, end)
        ):
            break
        last.append(span)
    return last[::-1]


def _joined(
    text: str, spans: list[tuple[int, int]], contents: list[str], before: str, behind: str
) -> str | None:
    """Return what boxes hold: as a list, as a tuple, or once where one is only repeated.

    It is None where nothing stands between two, and for an interval such as [1, 2).
    """
    once = contents[0] if len(set(contents)) == 1 else None
    joints = []
    for (_, end), (start, _) in pairwise(spans):
        joint = _BETWEEN.fullmatch(text, end + 1, start)
        if joint is None:
            return once
        joints.append(joint)
    first = _BEFORE.search(before)
    if first and all(joint[2] for joint in joints):  # x = \boxed{2}, y = \boxed{3}
        names = [first[1], *(joint[2] for joint in joints)]
        contents = [f"{name} {content}" for name, content in zip(names, contents, strict=True)]
    opening = before.replace(r"\[", "").rstrip("$ ")[-1:]  # \[ begins mathematics
    closing = behind.lstrip("$ ").removeprefix(r"\right")[:1]
    is_tuple = opening == "(" and closing == ")"
    if opening and opening in "([" and closing and closing in ")]" and not is_tuple:
        return None
    if once and len(set(contents)) == 1 and not is_tuple:
        return once
    listing = (" or " if all(joint[1] == "or" for joint in joints) else ", ").join(contents)
    return f"({listing})" if is_tuple and "or" not in listing else listing
