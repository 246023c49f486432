"""Finds the answer that a completion states in its text."""

import re
from collections.abc import Iterator
from functools import lru_cache

from kdrl_train.rollouts.answers.units import read_unit

MAX_ANSWER_CHARS = 1000
"""A longer answer is not read, and a statement is searched no further."""

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_STATEMENT = re.compile(r"#{4,}|\banswer\b[^\n.:=]{0,80}?(?:\bis\b|[:=])", re.IGNORECASE)
_INLINE_OR_STOP = re.compile(r"(?<!\\)\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|[.!?;](?=\s|[*_`]|$)")
_CHANGES_VALUE = re.compile(  # \0 stands for the mathematics
    r"""[^\0A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\s.,:;!?*_`'"\u2018-\u201d\u3001\u3002]
    |[^\W_]\0|\0[^\W_]  # a letter beside it: 2$\pi$x
    |(?<![\w'])[a-z](?![\w'])(?!(?<=[ai])\s+[a-z]{2})  # a letter alone, but for a day, I think
    |\b(?:not?|half|third|twice|thrice|double|triple|minus|negative|times|plus|divided|multiplied
    |squared|cubed|(?:square|cube)\sof|roots?|power|factorial|at\s(?:least|most)|(?:more|less)\sthan
    |dozen|hundred|thousand|[mbtr]+illion)\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""What is around inline mathematics and neither a plain word nor punctuation, such as ², ½ and @,
or is a word that makes another value of it."""
_REMARK = re.compile(r"(?<=\0)\s+\([A-Za-z ,']*\)")
_WORDS = re.compile(r"\s*([A-Za-z]{2,}(?:\s+[A-Za-z]{2,}){0,3})")
_NUMERAL = r"\d\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u218f"
_TIMES = r"\\(?:times|cdot|div)(?![a-z])|[\u00d7\u00b7\u00f7\u22c5]"
_GOES_ON_BEFORE = re.compile(
    rf"(?:[{_NUMERAL}+/^\u2212\u2013\u221a-\u221c\u03c0-]|(?:{_TIMES}|\\pi)\s*"
    r"|(?:\\(?:sqrt(?:\s*\[[^\]]*\])?|[dtc]?frac(?:\s*\{[^{}]*\})?|[dt]?binom)|\^)\s*\{?\s*"
    r"|_\s*\{\s*)\Z"
)
_GOES_ON_BEHIND = re.compile(
    rf"[{_NUMERAL}\u221a-\u221c\u03c0]|[a-z](?![a-z])|[/+=@&_-](?=[0-9\\(]|[a-z](?![a-z]))"
    rf"|\s*\^(?!\s*\{{?\s*\\circ)|\\(?:frac|pi|sqrt)(?![a-z])|\s*(?:{_TIMES})\s*[0-9(\\]"
    r"|\s*(?:\\text\{\s*)?(?:dozen|hundred|thousand|[mbtr]+illion)\b",
    re.IGNORECASE,
)
r"""A box is read alone where words or units follow it, and the degrees of \boxed{90}^\circ."""
_DELIMITER = re.compile(r"\\[()\[\]]")
_THOUGHT_END = "</think>"
"""Parts a thought from the reply; a statement in the reply counts before a box in the thought."""


@lru_cache(maxsize=1)  # the reward reads the answer, and then the vote does
def last_answer(text: str) -> str | None:
    """Read the answer that a completion states, without its box, dollar signs or full stop.

    Args:
        text: a completion of any length; the search takes time linear in it.
    Returns: the content of the last closed `\\boxed{}` (`\\fbox{}`), the innermost of nested ones;
        else the rest of the line after the last `####` or "answer is" that has one, up to the
        sentence's end; else None. A box that was cut off does not count. Where the last one is a
        part of an expression, as in `\\boxed{5}²`, there is no answer. What stands behind the last
        `</think>` counts before all else, if it states an answer.
    """
    _, end, reply = text.rpartition(_THOUGHT_END)
    stated = _last_answer(reply) if end else None
    return _last_answer(text) if stated is None else stated


def _last_answer(text: str) -> str | None:
    """Return the last answer in a text without thoughts, as last_answer does."""
    span = max(box_spans(text), default=None)
    if span is not None:
        return None if _is_part(text, *span) else text[span[0] : span[1]].strip()
    for head in reversed(list(_STATEMENT.finditer(text))):
        rest = text[head.end() : head.end() + 2 * MAX_ANSWER_CHARS].lstrip(" \t\r\n:=*_")
        statement = _strip_statement(rest.split("\n", 1)[0])
        if statement:
            return statement
    return None


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


def _is_part(text: str, start: int, end: int) -> bool:
    """Say whether the box with this content is a part of a longer expression."""
    box = text.rindex("\\", 0, start)
    before, behind = text[max(0, box - 40) : box], text[end + 1 : end + 100].lstrip("$")
    return bool(_GOES_ON_BEFORE.search(before) or _GOES_ON_BEHIND.match(behind))


def _strip_statement(line: str) -> str:
    r"""Return the stated value: the sentence's inline mathematics, else the whole sentence.

    Where the words around change the value (2$\pi$, not $5$), they stay, so that no part is read
    alone.
    """
    segments, outside, end = [], "", 0
    for match in _INLINE_OR_STOP.finditer(line):
        outside += line[end : match.start()]
        end = match.end()
        if not match.lastindex:
            break
        segments.append(match[match.lastindex].strip() + _unit_behind(line, end))
        outside += "\0"
    else:
        outside, end = outside + line[end:], len(line)
    changed = "\0" in line or _CHANGES_VALUE.search(_REMARK.sub("", outside))
    if segments and not changed:
        return ", ".join(segments)
    kept = line[:end].replace("$", " ") if segments else line[:end]
    return _DELIMITER.sub(" ", kept).strip(" \t\r*_`$.!?;")


def _unit_behind(line: str, end: int) -> str:
    """Return the longest unit that the words from a place on begin with, after a space; or ""."""
    match = _WORDS.match(line, end)
    words = match[1].split() if match else []
    phrases = (" ".join(words[:count]) for count in range(len(words), 0, -1))
    return next((f" {phrase}" for phrase in phrases if phrase != "in" and read_unit(phrase)), "")
