"""Computes expressions, exactly where they are rational, and says which of two are equal."""

import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mpmath import MPContext

from kdrl_train.rollouts.answers.expressions import FUNCTIONS, Node
from kdrl_train.rollouts.answers.tokens import UnreadableError

TOLERANCE = Fraction(1, 10**6)
"""Largest relative error of a decimal that stands for a number without a finite decimal form."""
DIGITS = (80, 160)
"""Two expressions are equal where their difference shrinks as it is computed with more digits."""
REACH = 10**60
"""Largest ratio of two terms of a sum: DIGITS, less what roundings before it cost."""
POINTS = 3
"""Random values for the variables at which two expressions are compared."""

MAX_BITS = 200_000
"""Of an exact power; a larger one is computed in floating point."""
MAX_LOG = 10**8
"""Largest logarithm of a number; a larger one would take the memory of the machine."""
MAX_FACTORIAL = 3000
"""Largest argument of an exact factorial."""

_UNKNOWN_BASE = Fraction(73939133, 31415926)
"""Stands for the natural logarithm of the base of \\log, which may be 10 or e: no answer has it."""


class NoValueError(ValueError):
    """An expression has no value that can be computed: 1/0, or a tower of powers."""


def _context(digits: int) -> Any:
    """Return an mpmath context of its own: mpmath's global one belongs to the user's code."""
    context = MPContext()
    context.dps = digits
    return context


_CONTEXTS = {digits: _context(digits) for digits in DIGITS}


def symbols(node: Node) -> frozenset[str]:
    """Return the names of an expression's variables."""
    if node.operation == "symbol":
        return frozenset([node.name])
    return frozenset().union(*(symbols(operand) for operand in node.operands))


def variants(node: Node) -> list[Node]:
    """Return the expressions that ± stands for, or the expression alone.

    Raises: UnreadableError for several ±, whose signs may belong together or not.
    """
    count = _count(node, "pm")
    if count > 1:
        raise UnreadableError("several ± may have linked signs or not")
    return [_with_sign(node, sign) for sign in (1, -1)] if count else [node]


def _count(node: Node, operation: str) -> int:
    return (node.operation == operation) + sum(_count(x, operation) for x in node.operands)


def _with_sign(node: Node, sign: int) -> Node:
    operands = tuple(_with_sign(operand, sign) for operand in node.operands)
    if node.operation == "pm":
        return Node("mul", (Node("number", number=Fraction(sign)), *operands))
    return Node(node.operation, operands, node.name, node.number, node.decimal)


@lru_cache(maxsize=4096)  # a gold answer is computed once, not once per completion of its group
def exact(node: Node) -> Fraction | None:
    """Return the value of an expression that is rational step by step; None for another one.

    Raises: NoValueError for an expression without a value.
    """
    if node.operation == "number":
        return node.number
    values = [exact(operand) for operand in node.operands]
    if not values or any(value is None for value in values):
        return None
    rational = [value for value in values if value is not None]
    rule = _EXACT.get(node.operation)
    return None if rule is None else rule(*rational)


def _divide(a: Fraction, b: Fraction) -> Fraction:
    if b == 0:
        raise NoValueError("a division by 0 has no value")
    return a / b


def _exact_root(a: Fraction, n: Fraction) -> Fraction | None:
    """Return the real root of a power; None where it is irrational, or left to compute."""
    if n.denominator != 1 or not 2 <= n <= 64 or (a < 0 and n % 2 == 0):
        return None
    roots = [_whole_root(abs(part), int(n)) for part in (a.numerator, a.denominator)]
    if roots[0] is None or roots[1] is None:
        return None
    return Fraction(roots[0] if a >= 0 else -roots[0], roots[1])


def _whole_root(number: int, n: int) -> int | None:
    """Return the n-th root of a natural number, by bisection; None where it is not whole."""
    low, high = 0, 1 << (number.bit_length() // n + 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if middle**n < number else (low, middle)
    return low if low**n == number else None


def _power(a: Fraction, b: Fraction) -> Fraction | None:
    if b.denominator != 1:
        root = _exact_root(a, Fraction(b.denominator))
        return None if root is None else _power(root, Fraction(b.numerator))
    if a == 0 and b <= 0:
        raise NoValueError("0 to a power of 0 or below has no value")
    bits = max(a.numerator.bit_length(), a.denominator.bit_length())
    if abs(a) not in (0, 1) and bits * abs(b) > MAX_BITS:
        return None
    return a ** int(b) if abs(a) != 1 else a ** int(b % 2)


def _factorial(n: Fraction) -> Fraction | None:
    if n.denominator != 1 or n < 0:
        raise NoValueError("a factorial must be of a natural number")
    if n > MAX_FACTORIAL:
        return None
    product = 1
    for factor in range(2, int(n) + 1):
        product *= factor
    return Fraction(product)


def _binomial(n: Fraction, k: Fraction) -> Fraction | None:
    if n.denominator != 1 or k.denominator != 1 or n < 0:
        raise NoValueError("a binomial coefficient must be of natural numbers")
    if not 0 <= k <= n:
        return Fraction(0)
    k = min(k, n - k)
    if k > MAX_FACTORIAL:
        return None
    value = Fraction(1)
    for i in range(1, int(k) + 1):
        value = value * (n - k + i) / i
    return value


_EXACT: dict[str, Callable[..., Fraction | None]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div": _divide,
    "pow": _power,
    "root": _exact_root,
    "factorial": _factorial,
    "binom": _binomial,
    "abs": abs,
    "floor": lambda a: Fraction(a.numerator // a.denominator),
    "ceil": lambda a: Fraction(-(-a.numerator // a.denominator)),
}


def compute(node: Node, digits: int, point: Mapping[str, Fraction]) -> Any:
    """Return the value of an expression as an mpmath number with so many digits.

    Raises: NoValueError for an expression without a value.
    """
    context = _CONTEXTS[digits]
    rational = exact(node)
    if rational is not None:
        return context.mpf(rational.numerator) / rational.denominator
    if node.operation == "symbol":
        return context.mpf(point[node.name].numerator) / point[node.name].denominator
    if node.operation in ("pi", "e", "i"):
        return {"pi": +context.pi, "e": +context.e, "i": context.mpc(0, 1)}[node.operation]
    operands = [compute(operand, digits, point) for operand in node.operands]
    if node.operation == "pow":
        exponent = exact(node.operands[1])
        if exponent is not None and 1 < exponent.denominator < 1000 and exponent.denominator % 2:
            root = _root(context, operands[0], context.mpf(exponent.denominator))
            operands = [root, context.mpf(exponent.numerator)]  # of a negative number the real one
    try:
        value = _FLOATING[node.operation](context, *operands)
    except (ZeroDivisionError, OverflowError, TypeError, ValueError) as error:
        raise NoValueError(f"{node.operation} has no value: {error}") from error
    if not context.isfinite(value):
        raise NoValueError(f"{node.operation} has no finite value")
    return value


def _add(_context: Any, a: Any, b: Any) -> Any:
    """Return a + b; refuse a large number whose digits do not reach the other one, as 5000! + 1."""
    low, high = sorted((abs(a), abs(b)))
    if high > REACH and 0 < low < high / REACH:
        raise NoValueError("a sum of so large and so small a number is not computed")
    return a + b


def _bounded_power(context: Any, a: Any, b: Any) -> Any:
    if a == 0:
        if context.re(b) <= 0:
            raise NoValueError("0 to a power of 0 or below has no value")
        return context.mpf(0)
    logarithm = b * context.log(a)
    if abs(logarithm) > MAX_LOG:
        raise NoValueError("a power is too large to compute")
    if context.isint(b) and abs(b) < 1000:
        return a ** int(context.re(b))
    return context.exp(logarithm)


def _root(context: Any, a: Any, n: Any) -> Any:
    if not context.isint(n) or not 2 <= context.re(n) <= 1000:
        raise NoValueError("the degree of a root must be a natural number from 2 on")
    if context.im(a) == 0 and context.re(a) < 0 and int(context.re(n)) % 2:
        return -context.root(-context.re(a), int(context.re(n)))  # the real one
    return context.root(a, int(context.re(n)))


def _bounded(name: str, largest: int) -> Callable[[Any, Any], Any]:
    """Return an mpmath function that refuses arguments beyond `largest`."""

    def function(context: Any, a: Any) -> Any:
        if abs(a) > largest:
            raise NoValueError(f"{name} of such a large number is not computed")
        return getattr(context, name)(a)

    return function


def _real(name: str) -> Callable[[Any, Any], Any]:
    """Return floor or ceil, which complex numbers do not have."""

    def function(context: Any, a: Any) -> Any:
        if context.im(a) != 0:
            raise NoValueError(f"{name} must be of a real number")
        return getattr(context, name)(context.re(a))

    return function


def _binomial_of_large(context: Any, n: Any, k: Any) -> Any:
    if max(abs(n), abs(k)) > 10**6:
        raise NoValueError("a binomial coefficient of such large numbers is not computed")
    return context.binomial(n, k)


_NAMES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
_FLOATING: dict[str, Callable[..., Any]] = {
    "add": _add,
    "mul": lambda _, a, b: a * b,
    "div": lambda _, a, b: a / b,
    "pow": _bounded_power,
    "root": _root,
    "abs": lambda _, a: abs(a),
    "floor": _real("floor"),
    "ceil": _real("ceil"),
    "factorial": _bounded("factorial", 10**6),
    "binom": _binomial_of_large,
    "degrees": lambda context, a: a * context.pi / 180,
    "ln": lambda context, a: context.log(a),
    "log": lambda context, a: context.log(a) * _UNKNOWN_BASE,
    "log_base": lambda context, a, base: context.log(a) / context.log(base),
    "exp": _bounded("exp", MAX_LOG),
    **{name: _bounded(_NAMES.get(name, name), 10**9) for name in FUNCTIONS - {"ln", "log", "exp"}},
}


def is_decimal(node: Node) -> bool:
    """Say whether a number was written as a decimal, perhaps with a sign or a power of ten."""
    return node.decimal or any(is_decimal(operand) for operand in node.operands)


def equal(a: Node, b: Node) -> bool:
    """Say whether two expressions are equal.

    Rational numbers are compared exactly. A decimal also equals a number without a finite decimal
    form, such as 1/3 or the root of 2, that it meets within TOLERANCE.
    """
    try:
        rational = exact(a), exact(b)
        if rational[0] is not None and rational[1] is not None:
            return rational[0] == rational[1] or _rounded(a, b) or _rounded(b, a)
        names = symbols(a) | symbols(b)
        if not names and (_rounded(a, b) or _rounded(b, a)):
            return True
        points = _points(Node("add", (a, b)), POINTS)
        return all(_meet(a, b, point) for point in points)
    except NoValueError:
        return False


def _rounded(decimal: Node, other: Node) -> bool:
    """Say whether a decimal stands for a number that has no finite decimal form."""
    value, number = exact(decimal), exact(other)
    if value is None or not is_decimal(decimal):
        return False
    if number is None:
        shown, true = (compute(node, DIGITS[0], {}) for node in (decimal, other))
        return bool(abs(shown - true) <= float(TOLERANCE) * abs(true))
    denominator = number.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator > 1 and abs(value - number) <= TOLERANCE * abs(number)


def ratio(a: Node, b: Node) -> float | None:
    """Return the real constant a / b; None where it is none, or 0."""
    points = _points(Node("div", (a, b)), POINTS)
    first = compute(Node("div", (a, b)), DIGITS[0], points[0])
    if first == 0 or abs(first.imag) > abs(first.real) * 1e-20:
        return None
    quotients = [compute(Node("div", (a, b)), DIGITS[0], point) for point in points]
    if any(abs(quotient - first) > abs(first) * 1e-40 for quotient in quotients):
        return None
    return float(first.real)


def _meet(a: Node, b: Node, point: Mapping[str, Fraction]) -> bool:
    """Say whether a difference is rounding alone: it shrinks as it is computed with more digits.

    Values that are merely small, such as e^{-500} and 0, differ.
    """
    coarse, fine = ([compute(node, digits, point) for node in (a, b)] for digits in DIGITS)
    difference = abs(fine[0] - fine[1])
    rounding = _CONTEXTS[DIGITS[1]].mpf(10) ** (40 - DIGITS[1]) * max(map(abs, fine))
    return bool(difference <= max(rounding, abs(coarse[0] - coarse[1]) * 1e-40))


def _points(node: Node, count: int) -> list[dict[str, Fraction]]:
    """Choose values of the variables, of both signs, where an expression has a value."""
    rng, points = random.Random(0), []
    names = sorted(symbols(node))
    if not names:
        compute(node, DIGITS[0], {})
        return [{}]
    for _ in range(20 * count):
        point = {name: Fraction(rng.randint(-30_000, 30_000), 10_007) for name in names}
        try:
            compute(node, DIGITS[0], point)
        except NoValueError:
            continue
        points.append(point)
        if len(points) == count:
            return points
    raise NoValueError("an expression must have a value somewhere")


def has_value(node: Node) -> None:
    """Raise NoValueError for an expression that has no value at any of many points."""
    _points(node, 1)


def spelling(node: Node) -> str:
    """Return one spelling for equal expressions: a fraction, or variables and values' digits."""
    try:
        rational = exact(node)
        if rational is not None:
            small = rational.numerator.bit_length() < 1000 and rational.denominator < 10**300
            # Python refuses to write an integer of more than 4,300 digits in decimal
            return str(rational) if small else f"{rational.numerator:x}/{rational.denominator:x}"
        numbers = [compute(node, DIGITS[0], point) for point in _points(node, POINTS)]
    except NoValueError as error:
        return f"no value: {error}"
    return ", ".join([*sorted(symbols(node)), *map(_shown, numbers)])


def _shown(number: Any) -> str:
    """Return a number with 20 digits, or a whole one as such: of \\log_2 4 it is 2."""
    context = _CONTEXTS[DIGITS[0]]
    whole = context.nint(number.real)
    if abs(number - whole) <= abs(whole) * context.mpf(10) ** -40 and abs(whole) < REACH:
        return str(int(whole))
    return str(context.nstr(number, 20))
