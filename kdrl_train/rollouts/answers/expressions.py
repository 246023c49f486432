"""Parses tokens as one mathematical expression: every token must find its place in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from kdrl_train.rollouts.answers.tokens import AnswerToken, UnreadableError

MAX_EXPONENT = 5000
"""Largest power of ten in a number such as 1e-9."""

FUNCTIONS = {
    *("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "ln", "log", "exp"),
    *("arcsin", "arccos", "arctan", "asin", "acos", "atan"),
}
SHORT_WORDS = {
    *("no", "on", "of", "up", "in", "it", "is", "at", "an", "as", "am", "pm", "do", "go", "we"),
    *("me", "us", "he", "be", "my", "to", "so", "or", "if", "and", "the", "for", "all", "any"),
    *("not", "yes", "odd", "one", "two", "six", "ten", "red", "new", "old", "per", "off", "out"),
    *("are", "was", "her", "his", "you", "she", "day", "man", "men", "boy", "sum", "set"),
    *("max", "min", "gcd", "lcm", "mod", "lim", "det", "arg", "deg"),
}
"""Words that are no product of variables."""
GREEK = {
    *("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "theta", "lambda", "mu", "nu"),
    *("rho", "sigma", "tau", "phi", "varphi", "omega", "kappa", "eta", "zeta", "xi", "psi", "chi"),
    *("Gamma", "Delta", "Theta", "Lambda", "Sigma", "Phi", "Omega", "Psi", "ell"),
}
_INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_NAMED_GROUPS = {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}
_END = AnswerToken("end", "")


@dataclass(frozen=True, slots=True, eq=False)  # a hash of the whole tree at each node is slow
class Node:
    """An operation on other nodes, a number or a symbol."""

    operation: str
    """number, symbol, add, mul, div, pow, pm, or the name of a function."""
    operands: "tuple[Node, ...]" = ()
    name: str = ""
    """Of a symbol."""
    number: Fraction = Fraction(0)
    decimal: bool = False
    """Whether a number was written with a decimal point."""


def number_node(text: str) -> Node:
    """Return the node of a number as it is spelled, exactly."""
    exponent = Decimal(text).adjusted()
    if abs(exponent) > MAX_EXPONENT:
        raise UnreadableError(f"{text[:20]} is beyond 1e{MAX_EXPONENT}")
    return Node("number", number=Fraction(text), decimal="." in text)


def parse(tokens: Sequence[AnswerToken]) -> Node:
    """Parse all tokens as one expression. Raises: UnreadableError where they are not one."""
    parser = _Parser(tokens)
    node = parser.sum()
    if parser.next is not _END:
        raise UnreadableError(f"{parser.next.text!r} does not belong to the expression before it")
    return node


class _Parser:
    """Descends recursively: a sum of products of powers of atoms."""

    def __init__(self, tokens: Sequence[AnswerToken]) -> None:
        self.tokens = list(tokens)
        self.place = 0
        self.in_bars = False
        """Whether the innermost open bracket is |, so that the next one closes it."""

    @property
    def next(self) -> AnswerToken:
        return self.peek(0)

    def peek(self, offset: int) -> AnswerToken:
        place = self.place + offset
        return self.tokens[place] if place < len(self.tokens) else _END

    def take(self) -> AnswerToken:
        token = self.next
        self.place += 1
        return token

    def at(self, *signs: str) -> bool:
        """Say whether the next token is one of these signs."""
        return self.next.kind == "sign" and self.next.text in signs

    def expect(self, sign: str) -> None:
        if not self.at(sign):
            raise UnreadableError(f"{sign!r} must follow, got {self.next.text!r}")
        self.take()

    def sum(self) -> Node:
        node = self.signed_product()
        while self.at("+", "-", r"\pm"):
            sign = self.take().text
            node = _combine(sign, node, self.product())
        return node

    def signed_product(self) -> Node:
        """Parse a product with signs before it: -x^2 is -(x^2)."""
        if self.at("+", "-", r"\pm"):
            sign = self.take().text
            return _combine(sign, Node("number"), self.signed_product())
        return self.product()

    def product(self) -> Node:
        node, divided = self.power(), False
        last = node
        while True:
            if self.at("*", "/"):
                sign = self.take().text
                factor = self.signed_factor()
                node = Node("mul" if sign == "*" else "div", (node, factor))
                divided = sign == "/"
            elif self.starts_factor() or (last.operation == "factorial" and self.at_factorial()):
                if divided:
                    raise UnreadableError("a/bc may be (a/b)c or a/(bc)")
                last = self.power()
                node = Node("mul", (node, last))
            else:
                return node

    def signed_factor(self) -> Node:
        if self.at("-"):
            self.take()
            return Node("mul", (Node("number", number=Fraction(-1)), self.power()))
        return self.power()

    def starts_factor(self) -> bool:
        """Say whether the next token can multiply what stands before it without a sign."""
        token = self.next
        if token.kind == "sign":
            opens = token.text in _CLOSING and not (
                token.text == "{" or (self.in_bars and token.text == "|")
            )
            return opens or (
                token.text.startswith("\\")
                and token.text[1:] in (GREEK | FUNCTIONS | {"pi", "frac", "sqrt", "binom"})
            )
        return token.kind == "word" or (token.kind == "text" and len(token.text.strip()) == 1)

    def power(self) -> Node:
        node = self.postfix(self.atom())
        if self.at("^"):
            self.take()
            node = self.postfix(Node("pow", (node, self.exponent())))
        return node

    def postfix(self, node: Node) -> Node:
        if self.at("!"):
            self.take()
            node = Node("factorial", (node,))
        if self.at(r"\degree"):
            self.take()
            node = Node("degrees", (node,))
        if self.at("!"):
            raise UnreadableError("!! may be a double factorial")
        return node

    def exponent(self) -> Node:
        if self.at("-", "+"):
            sign = self.take().text
            return _combine(sign, Node("number"), self.exponent())
        if self.next.kind == "word" and len(self.next.text) > 1 and self.next.text != "pi":
            raise UnreadableError("an exponent of several letters must be in braces")
        node = self.atom()
        if self.at("^"):
            self.take()
            return Node("pow", (node, self.exponent()))
        return self.postfix(node)

    def atom(self) -> Node:
        token = self.take()
        if token.kind == "number":
            return self.number(token)
        if token.kind == "word":
            return self.letters(token)
        if token.kind == "text" and len(token.text.strip()) == 1:
            return self.symbol(token.text.strip())
        if token.kind == "sign" and token.text in _CLOSING:
            return self.group(token.text)
        if token.kind == "sign" and token.text.startswith("\\"):
            return self.command(token.text[1:])
        raise UnreadableError(f"{token.text!r} must be a number, a symbol or a bracket")

    def number(self, token: AnswerToken) -> Node:
        node = number_node(token.text)
        if self.at("_"):
            raise UnreadableError("a number in a base stands alone")
        if self.at(r"\overline", r"\bar", r"\dot") and not self.next.spaced:
            return self.repeating(token.text)
        whole = token.text.isdigit()
        if whole and self.at(r"\frac"):
            place = self.place
            fraction = self.atom()
            parts = [part for part in fraction.operands if _is_whole(part)]
            if len(parts) < 2:
                self.place = place  # 2\frac{x}{3} is a product
                return node
            return _mixed(node, *parts)
        if whole and self.next.kind == "number" and self.next.spaced:
            parts = [number_node(self.take().text)]
            self.expect("/")
            if self.next.kind == "number":
                parts.append(number_node(self.take().text))
            return _mixed(node, *parts)
        return node

    def repeating(self, digits: str) -> Node:
        """Parse the digits under a bar, which repeat without end: 0.1\\overline{6}."""
        whole, point, before = digits.partition(".")
        self.take()
        bar = self.argument_tokens()
        if not point or len(bar) != 1 or not bar[0].text.isdigit():
            raise UnreadableError("a bar must stand over the digits behind a point")
        period = Fraction(int(bar[0].text), 10 ** len(bar[0].text) - 1)
        value = Fraction(f"{whole}.{before}0") + period / 10 ** len(before)
        return Node("number", number=value)

    def letters(self, token: AnswerToken) -> Node:
        """Parse a run of letters: a function, pi, or a product of variables."""
        word = token.text
        if word in FUNCTIONS:
            return self.function(word)
        if word == "sqrt":
            return self.root()
        if word.lower() == "pi":
            return Node("pi")
        if len(word) > 3 or word.lower() in SHORT_WORDS or word[:2] == "ln":
            raise UnreadableError(f"{word!r} is no variable")
        nodes = [*(_variable(letter) for letter in word[:-1]), self.symbol(word[-1])]
        if len(word) > 1 and self.at("!", r"\degree"):
            raise UnreadableError(f"{word}! may be one of its last letter or of all")
        if len(word) > 1 and self.at("^"):  # ab^2 is a b^2
            self.take()
            nodes[-1] = Node("pow", (nodes[-1], self.exponent()))
        return _product(nodes)

    def symbol(self, letter: str) -> Node:
        """Return the node of a letter with its subscript: x_1, a_{n}."""
        if not self.at("_"):
            return _variable(letter)
        self.take()
        parts = self.argument_tokens()
        if not all(part.kind in ("number", "word", "text") for part in parts):
            raise UnreadableError("a subscript must be letters or digits")
        return Node("symbol", name=f"{letter}_" + "".join(part.text for part in parts))

    def argument_tokens(self) -> list[AnswerToken]:
        """Take the tokens of {...}, or the next one."""
        if not self.at("{"):
            return [self.take()]
        self.take()
        taken = []
        while self.next is not _END and not self.at("}", "{"):
            taken.append(self.take())
        self.expect("}")
        return taken

    def group(self, opening: str) -> Node:
        outer, self.in_bars = self.in_bars, opening == "|"
        node = self.sum()
        self.expect(_CLOSING[opening])
        self.in_bars = outer
        name = _NAMED_GROUPS.get(opening)
        return Node(name, (node,)) if name else node

    def command(self, name: str) -> Node:
        if name == "frac":
            return Node("div", (self.argument(), self.argument()))
        if name == "binom":
            return Node("binom", (self.argument(), self.argument()))
        if name == "sqrt":
            return self.root()
        if name in FUNCTIONS:
            return self.function(name)
        if name == "pi":
            return Node("pi")
        if name in GREEK:
            return self.symbol(f"\\{name}")
        raise UnreadableError(f"\\{name} has no meaning in an expression")

    def argument(self) -> Node:
        """Parse the argument of \\frac and its like: {...}, or one digit, letter or command."""
        token = self.next
        if token.kind == "number" and len(token.text) == 2 and token.text.isdigit():
            rest = AnswerToken("number", token.text[1:])  # \frac12
            self.tokens[self.place : self.place + 1] = [AnswerToken("number", token.text[0]), rest]
        token = self.take()
        if token.kind == "number" and len(token.text) == 1:
            return number_node(token.text)
        if token.kind == "word" and len(token.text) == 1:
            return _variable(token.text)
        if token.kind == "sign" and token.text == "{":
            return self.group("{")
        if token.kind == "sign" and token.text == r"\pi":
            return Node("pi")
        raise UnreadableError(f"an argument must be in braces, got {token.text!r}")

    def root(self) -> Node:
        degree = Node("number", number=Fraction(2))
        if self.at("["):
            self.take()
            degree = self.group("[")
        if self.at("("):
            self.take()
            return Node("root", (self.group("("), degree))
        if self.next.kind == "number" and len(self.next.text) > 1:
            raise UnreadableError("the argument of a root must be in braces")
        return Node("root", (self.argument(), degree))

    def function(self, name: str) -> Node:
        """Parse a function with its power and argument: \\sin^2 2x, \\log_2 8, \\ln(x + 1)."""
        operands = []
        if name == "log" and self.at("_"):
            self.take()
            operands = [self.argument()]
            name = "log_base"
        power = None
        if self.at("^"):
            self.take()
            power = self.exponent()
            if _is_minus_one(power):
                power, name = None, _INVERSES.get(name, "")
                if not name:
                    raise UnreadableError("f^{-1} may be an inverse or 1/f")
        if self.at("(", "{", "["):
            node = Node(name, (self.group(self.take().text), *operands))
            if self.at("^"):
                raise UnreadableError("f(x)^2 may be f(x^2) or (f(x))^2")
        else:
            factors = [self.power()]
            while self.starts_factor() and not self.at_function():
                factors.append(self.power())
            node = Node(name, (_product(factors), *operands))
        return node if power is None else Node("pow", (node, power))

    def at_factorial(self) -> bool:
        """Say whether the factorial of a number follows, as the second one of 3!4!."""
        return self.next.kind == "number" and self.peek(1).text == "!"

    def at_function(self) -> bool:
        return self.next.text.removeprefix("\\") in FUNCTIONS


def _combine(sign: str, a: Node, b: Node) -> Node:
    """Return a + b, a - b or a ± b."""
    if sign == "-":
        b = Node("mul", (Node("number", number=Fraction(-1)), b))
    if sign == r"\pm":
        b = Node("pm", (b,))
    return Node("add", (a, b))


def _product(factors: Sequence[Node]) -> Node:
    """Multiply at least one factor."""
    node = factors[0]
    for factor in factors[1:]:
        node = Node("mul", (node, factor))
    return node


def _variable(letter: str) -> Node:
    """Return the node of a letter; i is the imaginary unit and e is Euler's number."""
    return Node({"i": "i", "e": "e"}.get(letter, "symbol"), name=letter)


def _is_whole(node: Node) -> bool:
    """Say whether a node is a natural number as written."""
    return node.operation == "number" and node.number.denominator == 1 and not node.decimal


def _is_minus_one(node: Node) -> bool:
    """Say whether an exponent was written -1."""
    if node.operation != "add":
        return False
    product = node.operands[1]
    return product.operation == "mul" and product.operands[1].number == 1


def _mixed(whole: Node, *fraction: Node) -> Node:
    """Return the number that a mixed number such as 5 1/2 stands for."""
    if len(fraction) != 2 or not all(map(_is_whole, fraction)):
        raise UnreadableError("two numbers in a row must be a mixed number such as 5 1/2")
    numerator, denominator = (part.number for part in fraction)
    if not 0 < numerator < denominator:
        raise UnreadableError("a mixed number must end in a fraction between 0 and 1")
    return Node("number", number=whole.number + numerator / denominator)
