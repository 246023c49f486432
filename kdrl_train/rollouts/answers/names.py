r"""Reads the name on the left of an equation: x, f(x), AB, \angle ABC, P(A | B), Total cost.

A name says of what the right side is the value, and changes nothing of it: AB = 30 states 30. An
expression that gives an unknown another value, such as 2x or x^2, is no name.
"""

import re
from collections.abc import Sequence

from kdrl_train.rollouts.answers import values
from kdrl_train.rollouts.answers.expressions import FUNCTIONS, GREEK, Node, parse
from kdrl_train.rollouts.answers.tokens import AnswerToken, UnreadableError

_SUBSCRIPT = r"(?:_(?:\w|\{\w+\}))?"
_INVERSE = r"(?:'+|\^\{?-1\}?)?"
_ARGUMENTS = r"\(\w(?:,\w)*\)"
_VARIABLE = re.compile(
    rf"[A-Za-z]?{_ARGUMENTS}|[A-Za-z]{_SUBSCRIPT}'+|[A-Zfgh]{_SUBSCRIPT}{_INVERSE}{_ARGUMENTS}"
    rf"|[fgh]\([fgh]\(\w\)\)|\([fgh]\\circ[fgh]\)\(\w\)",
    re.ASCII,
)
_POINT = rf"[A-Z]{_SUBSCRIPT}'*"
_LETTER = rf"\\(?:{'|'.join(sorted(GREEK))})"
_MARK = r"m?\\(?:angle|measuredangle|triangle|odot|overline|bar|widehat|hat|vec|overrightarrow)"
_MARKED = rf"{_MARK}(?:(?:{_POINT})+|\{{(?:(?:{_POINT})+|[a-z0-9]|{_LETTER})\}}|[a-z0-9]|{_LETTER})"
_SET = rf"{_POINT}(?:\\(?:cup|cap|setminus){_POINT})+"
_SQUARED = r"(?:\^\{?2\}?)?"
_QUANTITY = re.compile(
    rf"(?:(?:{_POINT}){{2,}}|{_MARKED}){_SQUARED}"  # a length, an angle
    rf"|\[(?:\\triangle)?(?:{_POINT}){{3,}}\]"  # an area
    rf"|(?:(?:{_POINT})+|[a-z])(?::(?:(?:{_POINT})+|[a-z]))+"  # a ratio
    rf"|\|(?:[zw]{_SUBSCRIPT}|(?:{_POINT})+|{_SET}|{_MARKED})\|"
    rf"|\\?(?:sin|cos|tan|cot|sec|csc){_SQUARED}[({{]?(?:{_MARKED}|(?:{_POINT})+|{_LETTER})[)}}]?",
    re.ASCII,
)
_SUBSCRIPTED = re.compile(r"[A-Za-z]_(?=\{)")
_FUNCTION = re.compile(  # p(p + 1) is a product: the letter stands in its argument
    r"(?:([A-Zfghpqrsuv])|\\(?:phi|varphi|sigma|tau|mu|omega|psi|zeta|Gamma|Pr|gcd|lcm|det|dim|max"
    rf"|min|deg)|\\mathbb\{{?[EP]\}}?|<[^<>]+>){_SUBSCRIPT}(?:'+|\^\{{?-1\}}?|\^\{{\(\d\)\}})?"
    r"(?=[(\[])(?!.*\1)",
    re.ASCII,
)
_MATRIX = re.compile(rf"(?:{_POINT})+(?:\^\{{?(?:-1|T)\}}?)?", re.ASCII)
_WORD = re.compile(r"[A-Za-z][A-Za-z' ]{3,}|sum|max|min|gcd|lcm|Sum")
_SMALL = re.compile(r"of|the|in|for|from|to|per|a|is|[A-Z]{1,4}|The|\\triangle|\\angle")
_NO_WORDS = FUNCTIONS | {"sqrt"}
_CHANGES = re.compile(
    r"\b(?:not|(?:half|third|quarter|square|cube|root|reciprocal|inverse|opposite) of|half the"
    r"|twice|thrice|(?:double|triple) the|minus|negative|(?:more|less) than|at (?:least|most))\b",
    re.IGNORECASE,
)


def variable(tokens: Sequence[AnswerToken]) -> str:
    """Return the name of a variable, of a function of one, or in \\text{}; else an empty text."""
    spelled = "".join(token.text for token in tokens)
    if len(tokens) == 1 and (tokens[0].kind == "text" or len(spelled) == 1):
        is_name = tokens[0].kind in ("text", "word") and not _CHANGES.search(spelled)
        return spelled.strip() if is_name else ""
    if _VARIABLE.fullmatch(spelled):
        return spelled
    try:
        node = parse(tokens)
    except UnreadableError:
        return ""
    return node.name if node.operation == "symbol" else ""


def quantity(tokens: Sequence[AnswerToken], *, of_matrix: bool = False) -> str:
    """Return the name of a quantity that has one value: AB, P(A | B), f(10), Total cost; or "".

    Args:
        of_matrix: whether the value is no number, so that A^{-1} is a name as well.
    """
    spelled = "".join(map(_spelled, tokens))
    function, subscripted = _FUNCTION.match(spelled), _SUBSCRIPTED.match(spelled)
    is_name = (
        _QUANTITY.fullmatch(spelled)
        or (of_matrix and _MATRIX.fullmatch(spelled))
        or (function and _is_bracketed(spelled[function.end() :]))
        or (subscripted and _is_bracketed(spelled[subscripted.end() :]))
        or _is_phrase(tokens)
    )
    segment = re.fullmatch(r"(?:\\overline\{)?([A-Z])([A-Z])\}?", spelled)
    if segment:
        return "".join(sorted(segment.groups()))  # AB is BA
    return spelled if is_name and not _CHANGES.search(spelled) else ""


def is_of_unknowns(node: Node) -> bool:
    """Say whether m + n, xy or m/n is what a problem asks for, and no step to an unknown.

    Of 2x + 2y = 30, (x + y)^2 = 30 and y - 2x = 1 more is to be computed, or they are lines.
    """
    is_step = node.operation == "div" and not values.symbols(node.operands[0])
    is_sum = node.operation in ("add", "mul", "div") and not is_step
    return is_sum and len(values.symbols(node)) > 1 and _is_of_letters(node)


def _is_of_letters(node: Node) -> bool:
    """Say whether an expression has no number but exponents, the 1 of 1/x and the -1 of a minus."""
    if node.operation == "number":
        return False
    operands = node.operands[:1] if node.operation == "pow" else node.operands
    sign = {"div": 1, "mul": -1}.get(node.operation)
    if sign and operands[0].operation == "number" and operands[0].number == sign:
        operands = operands[1:]
    return node.operation != "root" and all(map(_is_of_letters, operands))


def _spelled(token: AnswerToken) -> str:
    """Return a token's text, with <> around words of \\text{}."""
    text = token.text.strip()
    return f"<{text}>" if token.kind == "text" and not re.fullmatch(r"[A-Z]{1,4}", text) else text


def _is_bracketed(spelled: str) -> bool:
    """Say whether the bracket that a text begins with is closed by its end."""
    depth = 0
    for place, character in enumerate(spelled):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return place == len(spelled) - 1
    return False


def _is_phrase(tokens: Sequence[AnswerToken]) -> bool:
    """Say whether tokens are words, perhaps with points among them: Area of triangle ABC."""
    texts = [token.text.strip() for token in tokens]
    words = [bool(_WORD.fullmatch(text)) and text not in _NO_WORDS for text in texts]
    small = [bool(_SMALL.fullmatch(text)) for text in texts]
    return any(words) and all(map(max, words, small))
