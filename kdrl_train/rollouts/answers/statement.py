"""Finds the answer that a completion states in its text."""

import re
from collections.abc import Iterator
from functools import lru_cache

MAX_ANSWER_CHARS = 1000
"""A longer answer is not read, and a statement is searched no further."""

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_STATEMENT = re.compile(r"#{4,}|\banswer\b[^\n.:=]{0,80}?(?:\bis\b|[:=])", re.IGNORECASE)
_INLINE_OR_STOP = re.compile(r"(?<!\\)\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|[.!?;](?=\s|[*_`]|$)")
_CHANGES_VALUE = re.compile(
    r"[0-9+=/^<>\\-]|\b(?:not|no|half|twice|double|minus|negative|times|plus)\b", re.IGNORECASE
)
_DELIMITER = re.compile(r"\\[()\[\]]")


@lru_cache(maxsize=1)  # the reward reads the answer, and then the vote does
def last_answer(text: str) -> str | None:
    """Read the answer that a completion states, without its box, dollar signs or full stop.

    Args:
        text: a completion of any length; the search takes time linear in it.
    Returns: the content of the last closed `\\boxed{}` (`\\fbox{}`), the innermost of nested ones;
        else the rest of the line after the last `####` or "answer is" that has one, up to the
        sentence's end; else None. A box that was cut off does not count.
    """
    span = max(box_spans(text), default=None)
    if span is not None:
        return text[span[0] : span[1]].strip()
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


def _strip_statement(line: str) -> str:
    r"""Return the stated value: the sentence's inline mathematics, else the whole sentence.

    Where the words around change the value (2$\pi$, not $5$), they stay, so that no part is read
    alone.
    """
    segments, outside, end = [], "", 0
    for match in _INLINE_OR_STOP.finditer(line):
        outside += line[end : match.start()] + " "
        end = match.end()
        if not match.lastindex:
            break
        segments.append(match[match.lastindex].strip())
    else:
        outside, end = outside + line[end:], len(line)
    if segments and not _CHANGES_VALUE.search(outside):
        return ", ".join(segments)
    kept = line[:end].replace("$", " ") if segments else line[:end]
    return _DELIMITER.sub(" ", kept).strip(" \t\r*_`$.!?;")
