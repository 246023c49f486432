"""Cuts an answer into tokens, with one spelling for what LaTeX writes in many ways."""

import re
from dataclasses import dataclass
from unicodedata import normalize

MAX_TOKENS = 300
"""Of an answer: the depth of Python's stack bounds how long a sum may be."""
MAX_STYLES = 4
"""Of an answer, one around the other."""


def _fraction(mark: str) -> str:
    """Return the LaTeX of a fraction in one character."""
    numerator, _, denominator = normalize("NFKC", mark).partition("\N{FRACTION SLASH}")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


_CHARACTERS = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{DIVISION SIGN}": "/",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{SQUARE ROOT}": r"\sqrt ",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{INFINITY}": r"\infty ",
    "\N{DEGREE SIGN}": r"\degree ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\ne ",
    "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{UNION}": r"\cup ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{ANGLE}": r"\angle ",
    "\N{WHITE UP-POINTING TRIANGLE}": r"\triangle ",
    "\N{DOUBLE-STRUCK CAPITAL R}": r"\mathbb{R}",
    **{chr(code): _fraction(chr(code)) for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))},
    "\N{FRACTION SLASH}": "/",
    "\N{SUPERSCRIPT TWO}": "^2",
    "\N{SUPERSCRIPT THREE}": "^3",
    "\N{EURO SIGN}": r"\euro ",
    "\N{POUND SIGN}": r"\pounds ",
    "\N{YEN SIGN}": r"\yen ",
    "\N{NO-BREAK SPACE}": " ",
    "\N{THIN SPACE}": r"\,",
    "\N{NARROW NO-BREAK SPACE}": r"\,",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
}
_SPELLINGS = (  # in this order
    (r"\\thinspace(?![A-Za-z])\s*", r"\\,"),
    (r"\\\\\s*\[\s*[\d.]+\s*(?:ex|em|pt|mm|cm)\s*\]", r"\\\\ "),
    (r"\\begin\{array\}\s*\{[lcr| ]*\}", r"\\begin{matrix}"),
    (r"\\end\{array\}", r"\\end{matrix}"),
    (r"\\textdollar(?![A-Za-z])|\\\$", r"\\dollars "),
    (r"(?<!\\)\\[()\[\]]", " "),  # the ends of mathematics mode
    (r"\\(?:left|right|[bB]igg?[lr]?)\s*\.", " "),  # no bracket, and no decimal point
    (r"\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"\{,\}(?=\d{3})|(?<=\d)\\[,!:;](?=\d{3}(?!\d))", ""),  # 1{,}234 and 1\,234
    (r"(?<=\d)\\ (?=\d{3}(?!\d|\s*/))", ""),  # 1\ 234; 1\ 000/3 may be a mixed number
    (r"(?<=\d,)\\!(?=\d{3})", ""),  # 1,\!234
    (r"(?<!\\)\\[,;:!> ]|\\q?quad(?![A-Za-z])|~|\s+", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"^([^{}]*)\\over(?![A-Za-z])([^{}]*)$", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"^([^{}]*)\\choose(?![A-Za-z])([^{}]*)$", r"\\binom{\1}{\2}"),
    (r"\\colon(?![A-Za-z])", ":"),
    (
        r"\\text\{\s*([a-z]+) and\s*\}",
        r"\\text{\1}\\text{and}",
    ),  # 2\text{ feet and }3\text{ inches}
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\\text(?:bf|it|rm|tt|sc|sf|up|md|normal)\s*\{", r"\\text{"),  # \textsuperscript is a power
    (r"\\(?:mathrm|mathbf|mathit|mathsf|mbox|operatorname|text)\s*\{", r"\\text{"),
    (r"\\text\{\s*((?:arc)?(?:sin|cos|tan)|ln|log|exp|cot|sec|csc)\s*\}", r"\\\1 "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\\textdegree(?![A-Za-z])", r"\\degree "),
    (r"(?<=\d)\s*\^\s*(?:o(?![A-Za-z])|\{\s*o\s*\}|\{?\\text\{\s*o\s*\}\}?)", r"\\degree "),
    (r"\\text\{\s*(\\(?:dollars|euro|pounds|yen|degree))\s*\}", r"\1 "),
    (r"\\text\{\s*,\s*(and|or)\s*\}", r", \\text{\1}"),
    (r"\\(?:lor|vee)(?![A-Za-z])", r"\\text{or}"),
    (r"\\(?:land|wedge)(?![A-Za-z])", r"\\text{and}"),
    (r"\\bigcup(?![A-Za-z])|(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    (r"\\backslash(?![A-Za-z])", r"\\setminus "),
    (r"\\l[bB]race(?![A-Za-z])", r"\\{"),
    (r"\\r[bB]race(?![A-Za-z])", r"\\}"),
    (r"\\[lr]?[vV]ert(?![A-Za-z])", "|"),
    (r"\\le(?:q|qslant)?(?![A-Za-z])|<=", r"\\le "),
    (r"\\ge(?:q|qslant)?(?![A-Za-z])|>=", r"\\ge "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\neq?(?![A-Za-z])|!=", r"\\ne "),
    (r"\\(?:simeq|sim)(?![A-Za-z])", r"\\approx "),
    (r"\\(?:varnothing|O)(?![A-Za-z])", r"\\emptyset"),
    (r"\\(?:mathbb|Bbb)\s*\{?\s*R\s*\}?|\\R(?![A-Za-z])", r"\\reals "),
    (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\*\*", "^"),
    (r"\\%", "%"),
    (r"(?<![A-Za-z\\])(?:positive )?infinity(?![A-Za-z])", r"\\infty "),
    (r"(?<![A-Za-z])([ap])\.\s?m\.?(?![A-Za-z])", r"\1m"),
    (r"\\text\{([^A-Za-z{}]*)\}", r"\1"),  # \text{5} is 5
)
_REPLACEMENTS = [(re.compile(pattern), plain) for pattern, plain in _SPELLINGS]
_STYLED = re.compile(  # all of an answer in bold, in a colour, in braces
    r"\\(?:boldsymbol|bm|math(?:bf|rm|it|sf)|text(?:bf|it)|emph|underline|textcolor\{[A-Za-z]+\})\s*"
    r"\{(?=.*[^A-Za-z\s'.-])(.*)\}|\{(.*)\}",
    re.DOTALL,
)
_STYLE = re.compile(
    r"\\(?:bf|it|rm|tt|displaystyle|[lL]arge|LARGE|[hH]uge|color\{[A-Za-z]+\})(?![A-Za-z])\s*"
)
_TOKEN = re.compile(
    r"""(?P<number>\d+\.(?=\\(?:overline|bar|dot))|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?![A-Za-z\d.]))?)
    |\\text\{(?P<text>[^{}]*)\}
    |\\(?P<env>(?:begin|end)\{[a-z]+\})
    |(?P<command>\\(?:[A-Za-z]+|[{}\\]))
    |(?P<word>[A-Za-z]+)
    |(?P<space>\ +)
    |(?P<sign>[-+*/^_=<>(){}\[\]|!,;:%&'.])""",
    re.VERBOSE | re.ASCII,
)
_GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?!\d|,\d)")
_OPENING, _CLOSING = {"(", "[", r"\{"}, {")", "]", r"\}"}


class UnreadableError(ValueError):
    """An answer, or a part of it, has no reading, or more than one."""


@dataclass(frozen=True, slots=True)
class AnswerToken:
    """A piece of an answer."""

    kind: str
    """number, text, env, word, or sign (also for commands)."""
    text: str
    """As spelled; of \\text{...} the content."""
    spaced: bool = False
    """Whether white space stands before it."""


def plain_spelling(text: str) -> str:
    """Return an answer with one spelling for each symbol, without the signs of mathematics mode."""
    text = _without_style(text.strip())
    bare = text.replace(r"\$", "")
    if bare.startswith("$") and bare.count("$") == 1:
        text = rf"\{text}"  # $18 is a price, $18$ mathematics
    elif bare.count("$") % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    for character, plain in _CHARACTERS.items():
        text = text.replace(character, plain)
    for pattern, plain in _REPLACEMENTS:
        text = pattern.sub(plain, text)
    text = text.strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def _without_style(text: str) -> str:
    """Return an answer without a style, a colour or braces around all of it."""
    for _ in range(MAX_STYLES):
        style, styled = _STYLE.match(text), _STYLED.fullmatch(text)
        inside = styled and (styled[1] or styled[2])
        if style:
            text = text[style.end() :]
        elif inside and _is_balanced(inside):
            text = inside.strip()
        else:
            break
    return text


def _is_balanced(text: str) -> bool:
    """Say whether each brace of a text closes one that it opens."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0


def cut(text: str) -> list[AnswerToken]:
    """Cut an answer in its plain spelling into tokens.

    Commas between groups of three digits belong to a number. Inside of brackets, where they may
    part numbers as well, they do so only where other commas are followed by a space.

    Raises: UnreadableError at a character that has no meaning here.
    """
    tokens: list[AnswerToken] = []
    place, depth, spaced = 0, 0, False
    grouped_inside = re.search(r",\s", text) is not None
    while place < len(text):
        grouped = _GROUPED.match(text, place) if not depth or grouped_inside else None
        match = grouped or _TOKEN.match(text, place)
        if match is None:
            raise UnreadableError(f"{text[place : place + 10]!r} has no meaning in an answer")
        place = match.end()
        kind = "number" if grouped else str(match.lastgroup)
        if kind == "space":
            spaced = True
            continue
        piece = match[0].replace(",", "") if grouped else match[kind]
        depth += (piece in _OPENING) - (piece in _CLOSING)
        if len(tokens) == MAX_TOKENS:
            raise UnreadableError(f"an answer must have at most {MAX_TOKENS} symbols")
        tokens.append(AnswerToken("sign" if kind == "command" else kind, piece, spaced))
        spaced = False
    return tokens
