"""Rewards: pure functions (completion, gold answer) -> float. No torch, no transformers here.

The answer of a completion is what its last closed `\\boxed{}` holds; without one, what follows its
last `####` or "answer is" (also "answer:", "answer ="). A bare last number is not an answer: in a
cut-off completion it is an intermediate result, and paying for it rewards rambling.
"""

import importlib
import logging
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any

Reward = Callable[[str, str], float]
Answer = Callable[[str], str | None]

MAX_ANSWER_CHARS = 1000
"""A longer answer counts as unparseable: no gold answer of a mathematics set comes near it, and
the LaTeX parser needs seconds for it."""
MAX_DEPTH = 8
"""So does one with more brackets inside each other: the parser's time doubles with each pair."""

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_STATEMENT = re.compile(r"#{4,}|\banswer\b[^\n.:=]{0,80}?(?:\bis\b|[:=])", re.IGNORECASE)
_INLINE_MATH = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_NUMBER = r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|[-+]?\.[0-9]+"
_PLAIN_NUMBER = re.compile(_NUMBER)
# "18 dollars per day": the unit goes. Scaling words are part of the value, one letter is algebra.
_WITH_UNIT = re.compile(
    rf"({_NUMBER})\s+(?!(?:hundred|thousand|million|billion|dozen)\b)[A-Za-z]{{2}}[A-Za-z ,.]*"
)
_PLAIN_SPELLING = {"\N{MINUS SIGN}": "-", "{,}": ",", "\\!": "", "\\,": "", "\\$": ""}


class UnparseableError(ValueError):
    """The completion holds no answer that can be read: scored 0 and counted apart from wrong."""


@lru_cache(maxsize=1)  # the reward asks, and then the vote
def last_answer(text: str) -> str | None:
    """The answer that a completion commits to, without its box, dollar signs or full stop.

    Args:
        text: a completion, any length; the search is linear in it.
    Returns: the content of the last closed `\\boxed{}` (`\\fbox{}`), the innermost of nested ones;
        else the rest of the line after the last `####` or "answer is" that has one, up to the
        sentence's end; else None. A box that was cut off does not count.
    """
    boxed = _last_box(text)
    if boxed is not None:
        return boxed
    for head in reversed(list(_STATEMENT.finditer(text))):
        rest = text[head.end() : head.end() + 2 * MAX_ANSWER_CHARS].lstrip(" \t\r\n:=*_")
        statement = _strip_statement(rest.split("\n", 1)[0])
        if statement:
            return statement
    return None


def math_reward(completion: str, answer: str) -> float:
    """1.0 where the completion's last answer equals the gold answer as mathematics, else 0.0.

    Numbers are compared exactly (1,234 = 1234 = 1234.0 and 025 = 25), all else by math-verify:
    fractions, roots, sets, intervals, equations; decimals agree to 6 places.

    Args:
        completion: the policy's text; see `last_answer`.
        answer: the gold answer, a number or LaTeX, without `$` or box.
    Raises: UnparseableError where the completion has no readable answer; ValueError where the gold
        answer itself cannot be read (an error of the data, never of the policy).
    Time: not bounded here (symbolic comparison may hang); the Verifier holds the deadline.
    """
    check_answer(answer)
    given = _answer_of(completion)
    if given.strip() == answer.strip():
        return 1.0
    try:
        equal = _equal(given, answer) if _parses(given) else None
    except RecursionError:  # of sympy, whose trees may be deeper than what was written
        equal = None
    if equal is None:
        raise UnparseableError(f"answer of the completion must parse, got {given[:80]!r}")
    return float(equal)


def exact_reward(completion: str, answer: str) -> float:
    """1.0 where the completion's last answer is the gold answer letter by letter, else 0.0.

    Only surrounding white space is ignored. Raises UnparseableError without an answer.
    """
    given = _answer_of(completion)
    return float(given.strip() == answer.strip())


def check_answer(answer: str) -> None:
    """Raise ValueError, with the remedy, where `math` cannot read this gold answer."""
    if not _parses(answer):
        raise ValueError(
            f"answer must be a number or LaTeX that math-verify parses, got {answer[:80]!r}: "
            "correct the row, name another data.answer_column, or use reward.function=exact"
        )


def load_reward(name: str) -> Reward:
    """The reward function called `math`, `exact`, or `module:function` (imported).

    A function of one's own takes (completion, answer), returns a finite number (above 0: right),
    and may raise `UnparseableError`. It must be importable by name: it runs in other processes.
    Raises: ValueError for an unknown name, a missing module or function, or one not callable.
    """
    builtin: dict[str, Reward] = {"math": math_reward, "exact": exact_reward}
    if name in builtin:
        return builtin[name]
    rule = f"reward.function must be math, exact or module:function, got {name!r}"
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise ValueError(rule)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{rule}: {error}; install it or run from its folder") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "is missing from" if function is None else "is not callable in"
        raise ValueError(f"{rule}: {function_name} {found} {module_name}; name a function in it")
    return function


def warm_up(reward: Reward) -> None:
    """Make the first completion of a process as cheap as the others: for `math`, load math-verify
    and let its parser build its tables, most of a second."""
    if reward is math_reward:
        math_reward(r"\boxed{\frac{1}{x}}", "x^2")


def load_answer(reward: Reward) -> Answer:
    """How an answer is read for a majority vote: completion -> the spelling it votes for, or None.

    `math`: equal numbers, and expressions that parse alike, are one spelling. `exact`: the letters.
    Another reward says so in an attribute `answer` of its own; without it, `last_answer`.
    """
    if reward is math_reward:
        return _math_spelling
    return getattr(reward, "answer", last_answer)


def _math_spelling(completion: str) -> str | None:
    """1/2, 0.5 and \\frac{1}{2} are one answer; what cannot be read is none."""
    given = last_answer(completion)
    if given is None or not _parses(given):
        return None
    number = _plain_number(given)
    if number is not None:
        return str(Fraction(number))
    try:
        return str(_expressions(given)[0])
    except RecursionError:
        return None


def _answer_of(completion: str) -> str:
    given = last_answer(completion)
    if given is None:
        raise UnparseableError("completion must state an answer: \\boxed{}, #### or 'answer is'")
    return given


def _last_box(text: str) -> str | None:
    """Content of the last box (by where it opens) that is closed. One pass, no recursion."""
    open_braces: list[int | None] = []  # where a box's content starts; None: any other brace
    best_start, best_end = -1, -1
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and start > best_start:
                best_start, best_end = start, token.start()
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:  # \boxed{, not the escaped \{
            open_braces.append(token.end())
    return text[best_start:best_end].strip() if best_start >= 0 else None


def _strip_statement(line: str) -> str:
    """The stated value: inline mathematics where there is some, else up to the sentence's end."""
    segment = _INLINE_MATH.search(line)
    if segment:
        return next(group for group in segment.groups() if group is not None).strip()
    sentence = re.split(r"[.!?;](?=\s|[*_`]|$)", line, maxsplit=1)[0]
    return sentence.strip(" \t\r*_`$")


def _plain_number(text: str) -> Decimal | None:
    """The number that `text` spells, or None. Decimal: exact, and no limit on digits."""
    text = text.strip().strip("$").rstrip(".")
    for spelling, plain in _PLAIN_SPELLING.items():
        text = text.replace(spelling, plain)
    text = text.strip()
    with_unit = _WITH_UNIT.fullmatch(text)
    text = with_unit[1] if with_unit else text
    return Decimal(text.replace(",", "")) if _PLAIN_NUMBER.fullmatch(text) else None


@lru_cache(maxsize=4096)  # a gold answer is read once, not once per completion of its group
def _expressions(text: str) -> tuple[Any, ...]:
    """What math-verify reads in `text`: sympy expressions, () where it reads nothing."""
    number = _plain_number(text)
    latex = f"{number:f}" if number is not None else text.replace("$", "")
    return tuple(
        _math_verify().parse(f"${latex}$", fallback_mode="no_fallback", parsing_timeout=None)
    )


def _parses(text: str) -> bool:
    if not text.strip() or len(text) > MAX_ANSWER_CHARS or _depth(text) > MAX_DEPTH:
        return False
    return _plain_number(text) is not None or bool(_expressions(text))


def _depth(text: str) -> int:
    """How many brackets of whatever kind are open at once, at most."""
    steps = (-1 if char in "})]" else 1 for char in text if char in "{}()[]")
    return max(accumulate(steps), default=0)


def _equal(given: str, gold: str) -> bool:
    numbers = (_plain_number(given), _plain_number(gold))
    if numbers[0] is not None and numbers[1] is not None:
        if numbers[0] == numbers[1]:
            return True
        if all(number == number.to_integral_value() for number in numbers if number is not None):
            return False  # two different integers: 50 times faster than asking sympy
    gold_expressions, expressions = list(_expressions(gold)), list(_expressions(given))
    return _math_verify().verify(gold_expressions, expressions, timeout_seconds=None)


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    """math_verify, imported at first use: a second of sympy, and part of the `train` extra."""
    try:
        module = importlib.import_module("math_verify")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reward.function=math needs math-verify: pip install 'kdrl-kernels[train]'"
        ) from error
    # Its own time limit is off (signal.alarm fails in threads, and is swallowed there as a wrong
    # answer): the Verifier keeps the deadline. It would warn about that once per process.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return module
