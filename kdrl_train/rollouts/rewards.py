"""Defines rewards: pure functions (completion, gold answer) -> float, without torch.

The answer that a completion states is what its last closed `\\boxed{}` holds; without a box, what
follows its last `####` or "answer is" (also "answer:", "answer ="). A last number alone is not an
answer: in a completion that was cut off it is an intermediate result, and a reward for it would
teach the policy to ramble.
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

Reward = Callable[[str, str], float | tuple[float, bool]]
"""Maps (completion, gold answer) to a finite number, or to (number, whether it is right)."""
ReadAnswer = Callable[[str], str | None]
"""Maps a completion to the answer that it votes for; None: it has no vote."""

MAX_ANSWER_CHARS = 1000
"""A longer answer counts as unparseable: the LaTeX parser would need seconds for it."""
MAX_DEPTH = 8
"""An answer with more open brackets at once counts as unparseable: the parser's time doubles with
each pair."""

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_STATEMENT = re.compile(r"#{4,}|\banswer\b[^\n.:=]{0,80}?(?:\bis\b|[:=])", re.IGNORECASE)
_INLINE_MATH = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_NUMBER = r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|[-+]?\.[0-9]+"
_PLAIN_NUMBER = re.compile(_NUMBER)
# "18 dollars per day" is 18. A word such as million is part of the value; one letter is algebra.
_WITH_UNIT = re.compile(
    rf"({_NUMBER})\s+(?!(?:hundred|thousand|million|billion|dozen)\b)[A-Za-z]{{2}}[A-Za-z ,.]*"
)
_PLAIN_SPELLING = {"\N{MINUS SIGN}": "-", "{,}": ",", "\\!": "", "\\,": "", "\\$": ""}


class UnparseableError(ValueError):
    """A reward raises it where a completion states no answer that it can read.

    The completion gets the reward 0.0, and is counted apart from wrong ones.
    """


@lru_cache(maxsize=1)  # the reward reads the answer, and then the vote does
def last_answer(text: str) -> str | None:
    """Read the answer that a completion states, without its box, dollar signs or full stop.

    Args:
        text: a completion of any length; the search takes time linear in it.
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
    """Return 1.0 where the completion's answer equals the gold answer as mathematics, else 0.0.

    Numbers are compared exactly (1,234 = 1234 = 1234.0 and 025 = 25). math-verify compares all
    else: fractions, roots, sets, intervals, equations; decimals agree to 6 places.

    Args:
        completion: the policy's text; `last_answer` reads its answer.
        answer: the gold answer, a number or LaTeX, without `$` or box.
    Raises: UnparseableError where the completion has no readable answer; ValueError where the gold
        answer itself cannot be read, which is an error of the data, never of the policy.
    Time: not bounded here, since a symbolic comparison may hang; the Verifier holds the deadline.
    """
    check_readable(answer)
    stated = _stated_answer(completion)
    if stated.strip() == answer.strip():
        return 1.0
    try:
        equal = _equal(stated, answer) if _parses(stated) else None
    except RecursionError:  # from sympy, whose trees may be deeper than the text
        equal = None
    if equal is None:
        raise UnparseableError(f"answer of the completion must parse, got {stated[:80]!r}")
    return float(equal)


def exact_reward(completion: str, answer: str) -> float:
    """Return 1.0 where the completion's answer is the gold answer letter by letter, else 0.0.

    White space around the two is ignored.

    Raises: UnparseableError for a completion without an answer.
    """
    return float(_stated_answer(completion).strip() == answer.strip())


def check_readable(gold: str) -> None:
    """Raise ValueError, with the remedy, where `math` cannot read this gold answer."""
    if not _parses(gold):
        raise ValueError(
            "the gold answer must be a number or LaTeX that math-verify parses, got "
            f"{gold[:80]!r}: correct the record, name another data.answer_column, or set "
            "reward.function to exact"
        )


def load_reward(name: str) -> Reward:
    """Return the reward function named `math`, `exact`, or `module:function`, which is imported.

    A user's function takes (completion, answer), returns a finite number or (number, right), and
    may raise `UnparseableError`. It must be importable by name, since it runs in other processes.

    Raises: ValueError for an unknown name, for a missing module or function, and for a name that
        is not callable.
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
        problem = "is missing from" if function is None else "is not callable in"
        raise ValueError(f"{rule}: {function_name} {problem} {module_name}; name a function in it")
    return function


def warm_up(reward: Reward) -> None:
    """Make the first completion of a process as cheap as the others.

    For `math` this loads math-verify and makes its parser build its tables.
    """
    if reward is math_reward:
        math_reward(r"\boxed{\frac{1}{x}}", "x^2")


def load_answer(reward: Reward) -> ReadAnswer:
    """Return the function that reads the answer which a completion votes for.

    For `math`, equal numbers vote together, and so do expressions that parse alike. For `exact`,
    the letters of the answer vote. A user's reward may have such a function as its attribute
    `answer`; without it, `last_answer` is used.
    """
    if reward is math_reward:
        return _math_spelling
    return getattr(reward, "answer", last_answer)


def _math_spelling(completion: str) -> str | None:
    """Return one spelling for 1/2, 0.5 and \\frac{1}{2}; None where no answer can be read."""
    stated = last_answer(completion)
    if stated is None or not _parses(stated):
        return None
    number = _plain_number(stated)
    if number is not None:
        return str(Fraction(number))
    try:
        return str(_expressions(stated)[0])
    except RecursionError:
        return None


def _stated_answer(completion: str) -> str:
    """Return the completion's answer; raise UnparseableError where it states none."""
    stated = last_answer(completion)
    if stated is None:
        raise UnparseableError("completion must state an answer: \\boxed{}, #### or 'answer is'")
    return stated


def _last_box(text: str) -> str | None:
    """Return the content of the last closed box, by the place where it opens, in one pass."""
    open_braces: list[int | None] = []  # start of a box's content; None: any other brace
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
    """Return the stated value: the line's inline mathematics, else the text up to a full stop."""
    segment = _INLINE_MATH.search(line)
    if segment:
        return next(group for group in segment.groups() if group is not None).strip()
    sentence = re.split(r"[.!?;](?=\s|[*_`]|$)", line, maxsplit=1)[0]
    return sentence.strip(" \t\r*_`$")


def _plain_number(text: str) -> Decimal | None:
    """Return the number that `text` spells, or None; a Decimal is exact with any digits."""
    text = text.strip().strip("$").rstrip(".")
    for spelling, plain in _PLAIN_SPELLING.items():
        text = text.replace(spelling, plain)
    text = text.strip()
    with_unit = _WITH_UNIT.fullmatch(text)
    text = with_unit[1] if with_unit else text
    return Decimal(text.replace(",", "")) if _PLAIN_NUMBER.fullmatch(text) else None


@lru_cache(maxsize=4096)  # a gold answer is read once, not once per completion of its group
def _expressions(text: str) -> tuple[Any, ...]:
    """Return the sympy expressions that math-verify reads in `text`; () where it reads nothing."""
    number = _plain_number(text)
    latex = f"{number:f}" if number is not None else text.replace("$", "")
    return tuple(
        _math_verify().parse(f"${latex}$", fallback_mode="no_fallback", parsing_timeout=None)
    )


def _parses(text: str) -> bool:
    """Say whether `text` is short and flat enough, and can be read."""
    if not text.strip() or len(text) > MAX_ANSWER_CHARS or _depth(text) > MAX_DEPTH:
        return False
    return _plain_number(text) is not None or bool(_expressions(text))


def _depth(text: str) -> int:
    """Return the largest number of brackets, of any kind, that are open at once."""
    steps = (-1 if char in "})]" else 1 for char in text if char in "{}()[]")
    return max(accumulate(steps), default=0)


def _equal(stated: str, gold: str) -> bool:
    """Say whether two answers are equal as mathematics."""
    numbers = (_plain_number(stated), _plain_number(gold))
    if numbers[0] is not None and numbers[1] is not None:
        if numbers[0] == numbers[1]:
            return True
        if all(number == number.to_integral_value() for number in numbers if number is not None):
            return False  # two different integers: sympy would take much longer
    gold_expressions, expressions = list(_expressions(gold)), list(_expressions(stated))
    return _math_verify().verify(gold_expressions, expressions, timeout_seconds=None)


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    """Import math_verify at first use: it imports sympy, and is part of the `train` extra."""
    try:
        module = importlib.import_module("math_verify")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "math-verify must be installed for reward.function math, got no such module: "
            "pip install 'kdrl-kernels[train]'"
        ) from error
    # math-verify's time limit is off, as signal.alarm fails in threads, where it would count as a
    # wrong answer; the Verifier keeps the deadline. math-verify warns about that in each process.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return module
