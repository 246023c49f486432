"""hostile: each of 300 completions ends within its deadline, and no other one pays for it."""

import time
from collections import Counter
from collections.abc import Callable
from itertools import chain

import pytest

from kdrl_train.config import RewardConfig
from kdrl_train.rollouts.rewards import UnparseableError, math_reward
from kdrl_train.rollouts.verifier import Verifier

TIMEOUT_S = 0.5
WORKERS = 2
RESTART_S = 0.5
"""Seconds allowed for a new worker after a hang: pebble looks at its workers ten times a second."""
GOLD = ("5", r"\frac{1}{2}", "x^2+1", r"(1, 2)", r"\{1, 2\}", r"2\sqrt{3}")


def nested(depth: int) -> list[str]:
    """Make answers whose parse tree is `depth` levels deep, some of them unbalanced."""
    pairs = [
        *[("{", "}"), ("(", ")"), ("[", "]"), (r"\{", r"\}"), (r"\left(", r"\right)"), ("|", "|")],
        *[(r"\sqrt{", "}"), (r"\frac{1}{", "}"), (r"\frac{", "}{2}"), ("x^{", "}"), ("x_{", "}")],
        *[(r"\sin(", ")"), (r"\text{", "}"), (r"\overline{", "}"), ("-", ""), ("(1, ", ")")],
        *[(r"\begin{matrix}", r"\end{matrix}"), ("9^{", "}"), ("2^(", ")"), ("", "!")],
    ]
    return [opening * depth + "5" + closing * depth for opening, closing in pairs]


TOWERS = [
    *[
        "9^{9^{9^{9}}}",
        "9^9^9^9",
        "10^{10^{10^{10}}}",
        "2^{2^{2^{2^{2^{2}}}}}",
        "7^{7^{7^7}} - 7^{7^{7^7}}",
    ],
    *["10^{-10^{10}}", "10^{1000000000}", "1.0000001^{10^{12}}", "(-1)^{10^{100}}", "0^{0^{0}}"],
    *["9999!!!", "(10^6)!", r"((9!)!)!", r"\binom{10^9}{10^8}", r"\binom{100000}{50000}"],
    *[r"\sum_{i=1}^{10^{100}} i", r"\prod_{i=1}^{10^{9}} i", r"\int_0^1 x^{x^{x^x}} dx"],
    *[
        r"\lim_{x \to 0} \frac{\sin(\sin(\sin x))}{x}",
        r"\sqrt[1000000000]{2}",
        r"\log_{10}{10^{10^{10}}}",
    ],
    *[
        "(x+1)^{1000}",
        "(x+y+z)^{60}",
        "((x+1)^{99}+1)^{99}",
        r"\sin^{99}(x)\cos^{99}(x)",
        "x^{10^{10}}+1",
    ],
    *[
        r"e^{e^{e^{e^{e}}}}",
        r"\pi^{\pi^{\pi^{\pi}}}",
        r"i^{i^{i^{i}}}",
        r"\infty^{\infty}",
        r"\frac{1}{0}",
    ],
    *["1e999999999", "1e-999999999", r"0.\overline{142857}", "10^{10}%", r"5 \pm 10^{10^{10}}"],
    *[r"x \in \mathbb{R} \setminus \{10^{10^{10}}\}", r"\gcd(10^{10^9}, 3)", r"10^{10^9} \bmod 7"],
]
LONG = [
    *["9" * 900, "9" * 1_000_000, "0." + "0" * 1_000_000 + "1", "9," * 400, "1,000" * 190],
    *["1+" * 400 + "1", "x+" * 490 + "x", "x" * 900, r"\frac{1}{2}+" * 80, r"\sqrt{2}" * 120],
    *["x=" * 400 + "5", "5 or " * 190, r"\cdot 5" * 140, "x^2" * 300, "(x+1)" * 190, "5!" * 400],
    *[
        r"\left" * 190,
        r"\begin{pmatrix}" * 60,
        "$" * 900,
        "\\" * 900,
        "&" * 900,
        "^" * 900,
        "_" * 900,
    ],
    *[r"\begin{pmatrix}" + r"1 & 2 \\ " * 80 + r"\end{pmatrix}", r"\{" + "1," * 400 + r"1\}"],
    *["5" + " " * 990, "\n" * 990, "\t5" * 400, "-" * 901 + "5", "+" * 900 + "5", "." * 900],
    *["<" * 900, "1<" * 400 + "x", "%" * 900, "#" * 900, "~" * 900, "'" * 900, '"' * 900],
]
CHARACTERS = [
    *[
        "\ud800",
        "\udfff5",
        "5\ud83d",
        "\0",
        "5\0",
        "\0" * 900,
        "\x1b[2J5",
        "\r5\r",
        "\x7f5",
        "\x85",
    ],
    *[
        "\N{RIGHT-TO-LEFT OVERRIDE}5",
        "\N{RIGHT-TO-LEFT MARK}" * 900,
        "5\N{COMBINING ACUTE ACCENT}" * 90,
    ],
    *[
        "\N{ZERO WIDTH SPACE}5",
        "\ufeff5",
        "\N{FULLWIDTH DIGIT FIVE}",
        "\N{ARABIC-INDIC DIGIT FIVE}",
    ],
    *[
        "\N{VULGAR FRACTION ONE HALF}",
        "\N{SUPERSCRIPT TWO}",
        "\N{CIRCLED DIGIT FIVE}",
        "\N{INFINITY}",
    ],
    *["\U0001f4a9" * 400, "\U0010ffff", "\N{ROMAN NUMERAL FIVE}", "\N{SNOWMAN}^{9^{9^9}}", "五"],
]
CODE = [
    *[
        "__import__('os')._exit(3)",
        "__import__('os').kill(1, 9)",
        "exec('while 1: pass')",
        "lambda: 5",
    ],
    *[
        "().__class__.__bases__[0]",
        "{0.__class__}",
        "%s" * 400,
        "{}" * 400,
        "f'{9**9**9}'",
        "5; import os",
    ],
    *[
        "raise SystemExit",
        "None",
        "nan",
        "inf",
        "-inf",
        "NaN",
        "True",
        "zoo",
        "oo",
        "I",
        "E",
        "S",
        "N",
        "Q",
    ],
    *[
        r"\input{/etc/passwd}",
        r"\write18{ls}",
        r"\def\x{\x\x}\x",
        r"\newcommand{\a}{\a}\a",
        r"\loop\repeat",
    ],
]
UNSEEN = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f\u202e\u2066\ufe0f\u0301\0\x08\x1b"
"""Zero-width characters, marks of direction, a soft hyphen, an accent, NUL, backspace, escape."""
INVISIBLE = [form % c for c in UNSEEN for form in ("5%s", "%s5", "5%s0", "-%s5", "0.%s5")]
BOMBS = [  # for the regular expressions of the reader
    *[
        part * 300
        for part in ("twenty-", "{,}", r"\ ", r"^\circ", "x_", "a.m.", "p. ", "##", "(A)")
    ],
    *[
        r"\text{" * 140 + "a",
        "1,000" * 190 + ",",
        "$" + "5$ " * 300,
        "1." + "0" * 960 + "e",
        "e+" * 400,
    ],
    *[
        "0.(" + "3" * 900,
        "5" + r"\!" * 400,
        r"\frac" * 190 + "12",
        "base " * 190 + "2",
        "5_{" * 300,
    ],
]
AROUND = [  # hostile text around the answer, not in it; the search is linear in it
    *[
        r"\boxed{" * 100_000,
        "{" * 300_000,
        "}" * 300_000,
        "answer: " * 100_000,
        "####" * 200_000,
    ],
    *["\\" * 300_000, r"\boxed " * 100_000, "$" * 300_000, "the answer is " + "\n" * 300_000],
    *[
        "\ud800" * 100_000,
        "\0" * 300_000,
        "answer " * 200_000,
        "answer" + " " * 300_000 + "is 7",
    ],
    *[r"\boxed{" * 100_000 + "}" * 100_000, "the answer is $" * 100_000, r"\(" * 300_000],
]
ANSWERS = [*chain(*map(nested, (20, 100, 300))), *TOWERS, *LONG, *CHARACTERS, *CODE]
ANSWERS += INVISIBLE + BOMBS
HOSTILE = [*(rf"so \boxed{{{answer}}}" for answer in ANSWERS), *AROUND]


@pytest.mark.fault("hostile completion")
@pytest.mark.parametrize("answer", INVISIBLE, ids=ascii)
def test_a_number_with_an_unseen_character_in_it_is_not_read(answer: str) -> None:
    for statement in (rf"\boxed{{{answer}}}", f"#### {answer}", f"The answer is ${answer}$."):
        with pytest.raises(UnparseableError):
            math_reward(statement, "5")


@pytest.mark.slow  # test_verifier.py has one of each kind
@pytest.mark.fault("hostile completion")
def test_300_hostile_completions_harm_no_other(
    record_property: Callable[[str, object], None],
) -> None:
    record_property("tried", len(HOSTILE))
    assert len(HOSTILE) >= 300
    completions = list(chain(*((hostile, rf"\boxed{{{i}}}") for i, hostile in enumerate(HOSTILE))))
    golds = list(chain(*((GOLD[i % len(GOLD)], str(i)) for i in range(len(HOSTILE)))))
    with Verifier(RewardConfig(timeout_s=TIMEOUT_S, workers=WORKERS)) as verifier:
        verifier.score([r"\boxed{5}"], ["5"])  # the workers are up
        start = time.monotonic()
        verdicts = verifier.score(completions, golds)
        elapsed = time.monotonic() - start
        assert verifier.score([r"\boxed{5}"], ["5"]).outcomes == ["right"]
    assert verdicts.errors == {}
    assert verdicts.outcomes[1::2] == ["right"] * len(HOSTILE)  # no neighbour pays
    counts = Counter(verdicts.outcomes[::2])
    assert set(counts) <= {"right", "wrong", "unparseable", "timeout"}
    assert min(counts[name] for name in ("wrong", "unparseable")) >= 10
    assert elapsed < len(HOSTILE) * (TIMEOUT_S + RESTART_S) / WORKERS
    assert verdicts.rewards[::2].count(0.0) == len(HOSTILE) - counts["right"]
