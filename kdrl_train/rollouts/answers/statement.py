"""Finds the answer that a completion states in its text."""

import re
from functools import lru_cache

from kdrl_train.rollouts.answers.boxes import boxed_answer
from kdrl_train.rollouts.answers.units import read_unit

MAX_ANSWER_CHARS = 1000
"""A longer answer is not read, and a statement is searched no further."""

_STATEMENT = re.compile(
    r"#{4,}|\banswer\b[^\n.:=]{0,80}?"
    r"(?:\bis\b(?:\s+(?:thus|then|therefore|hence|simply|indeed|just|exactly)\b,?)?|[:=])",
    re.IGNORECASE,
)
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
_DELIMITER = re.compile(r"\\[()\[\]]")
_THOUGHT_END = "</think>"
"""Parts a thought from the reply; a statement in the reply counts before a box in the thought."""


@lru_cache(maxsize=1)  # the reward reads the answer, and then the vote does
def last_answer(text: str) -> str | None:
    """Read the answer that a completion states, without its box, dollar signs or full stop.

    Args:
        text: a completion of any length; the search takes time linear in it.
    Returns: the content of the last closed `\\boxed{}` (`\\fbox{}`), the innermost of nested ones,
        and of those that a comma, "and" or "or" joins to it; else the rest of the line after the
        last `####` or "answer is" that has one, up to the sentence's end; else None. A box that was
        cut off does not count. Where the last one is a part of an expression, as in `\\boxed{5}²`,
        there is no answer. What stands behind the last `</think>` counts before all else, if it
        states an answer.
    """
    _, end, reply = text.rpartition(_THOUGHT_END)
    stated = _last_answer(reply) if end else None
    return _last_answer(text) if stated is None else stated


def _last_answer(text: str) -> str | None:
    """Return the last answer in a text without thoughts, as last_answer does."""
    is_boxed, answer = boxed_answer(text)
    if is_boxed:
        return answer
    for head in reversed(list(_STATEMENT.finditer(text))):
        rest = text[head.end() : head.end() + 2 * MAX_ANSWER_CHARS].lstrip(" \t\r\n:=*_")
        statement = _strip_statement(rest.split("\n", 1)[0])
        if statement:
            return statement
    return None


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
