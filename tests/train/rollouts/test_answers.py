"""answers: hundreds of pairs, worked by hand, of equal and of different answers (answers.txt)."""

import random
import sys
import time
import unicodedata
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from kdrl_train.rollouts.rewards import UnparseableError, check_readable, math_reward

LINES = Path(__file__).with_name("answers.txt").read_text(encoding="utf-8").splitlines()
EQUAL = [line.split(" ≡ ") for line in LINES if " ≡ " in line]
DIFFERENT = [tuple(line.split(" ≢ ")) for line in LINES if " ≢ " in line and line[0] != "#"]
REFUSED = [line.removeprefix("✗ ") for line in LINES if line.startswith("✗ ")]


def reward(stated: str, gold: str) -> float | None:
    """Judge a boxed answer; None where it, or the gold answer, cannot be read."""
    try:
        return math_reward(rf"so \boxed{{{stated}}}", gold)
    except ValueError:
        return None


@pytest.mark.parametrize("spellings", EQUAL, ids=lambda spellings: ascii(spellings[0]))
def test_equal(spellings: list[str]) -> None:
    first = spellings[0]
    pairs = [*((first, other) for other in spellings), *((other, first) for other in spellings)]
    assert [pair for pair in pairs if reward(*pair) != 1.0] == []


def test_different() -> None:
    pairs = [*DIFFERENT, *((b, a) for a, b in DIFFERENT)]
    assert len(pairs) >= 300
    assert [pair for pair in pairs if reward(*pair)] == []


@pytest.mark.parametrize("gold", [*REFUSED, "", "  ", "9" * 1001])
def test_a_gold_answer_that_is_not_read_whole_is_refused(gold: str) -> None:
    with pytest.raises(ValueError, match="the gold answer must be a number, LaTeX, a word or"):
        check_readable(gold)
    assert not reward(gold, "5")


def test_a_damaged_answer_is_judged_or_unparseable() -> None:
    """Nothing else may be raised: it would be an error of the reward function."""
    rng, unparseable = random.Random(0), 0
    answers = [
        *(text for line in EQUAL for text in line),
        *(text for two in DIFFERENT for text in two),
    ]
    for _ in range(2000):
        text, other = rng.choice(answers), rng.choice(answers)
        start, end = sorted(rng.choices(range(len(text) + 1), k=2))
        try:
            math_reward(rf"\boxed{{{text[:start]}{other[: rng.randint(0, 4)]}{text[end:]}}}", "5")
        except UnparseableError:
            unparseable += 1
    assert 200 < unparseable < 1800


LONG = ["10^{10^{10^{10}}}", "9999999!", "2^{2^{2^{2^{2^2}}}}", r"\sin(10^{10^6})", "|" * 250]
LONG += ["(x+1)" * 49 + "(x+1)", "5," * 99 + "6", r"\sqrt{2}" * 60, "-" * 290 + "5", "x^2" * 99]
LONG += [r"\binom{10^9}{10^8}", "e^{e^{e^{e^e}}}", "1+" * 140 + "1", "9^{9^{9^9}}-9^{9^{9^9}}"]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:20])
def test_no_answer_takes_long(text: str) -> None:
    start = time.process_time()
    assert not reward(text, "5")
    assert not reward(text, "x")
    assert not reward(r"\sqrt{2}", text)
    assert time.process_time() - start < 2


SPACES = {chr(i) for i in range(sys.maxunicode) if chr(i).isspace()} | {"~"}  # ~ is LaTeX's space
PRICES = set("$\N{EURO SIGN}\N{POUND SIGN}\N{YEN SIGN}")  # 5 euros equal 5 without a unit
ENDS = set(".,:;!?*_`'\"\N{IDEOGRAPHIC FULL STOP}\N{IDEOGRAPHIC COMMA}")
ENDS |= set("\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}")
ENDS |= set("\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}")
ENDS |= {"\N{SINGLE LOW-9 QUOTATION MARK}", "\N{SINGLE HIGH-REVERSED-9 QUOTATION MARK}"}
DECORATIONS = {  # of 5 in an answer, with the characters that change nothing
    r"\boxed{5%s}": SPACES | PRICES - {"$"} | set(".%\N{DEGREE SIGN}") | {"}"},  # } ends the box
    r"\boxed{5 %s}": SPACES | PRICES - {"$"} | set(".%\N{DEGREE SIGN}") | {"}"},
    r"\boxed{%s5}": SPACES | PRICES | set("+0"),
    r"\boxed{5%s6}": set(),
    "The answer is $5$%s": SPACES | PRICES | ENDS | set("%\N{DEGREE SIGN}"),
}


@pytest.mark.fault("hostile completion")
@pytest.mark.parametrize("form", DECORATIONS)
def test_no_character_of_an_answer_is_skipped(
    form: str, record_property: Callable[[str, object], None]
) -> None:
    """Each of these changes the value, or makes it unreadable, but for those listed above."""
    ranges = range(0x180), range(0x300, 0x310), range(0x2000, 0x20B0), range(0x2150, 0x2160)
    characters = [*map(chr, chain(*ranges)), "\N{FULLWIDTH DIGIT SIX}", "\U0001d7d4", "\ufeff"]
    characters = [c for c in characters if unicodedata.category(c) != "Cn"]
    record_property("tried", len(characters))
    right = set()
    for character in characters:
        try:
            right |= {character} if math_reward(form % character, "5") else set()
        except UnparseableError:
            continue
    assert right == DECORATIONS[form] & set(characters)


BESIDE = ["$%s$\N{SUPERSCRIPT TWO}", "$%s$ \N{VULGAR FRACTION ONE HALF}", "$%s$@6", "$%s$ million"]
BESIDE += ["$%s$ feet", "2$%s$", "$%s$x", "$%s$ squared", "square root of $%s$", "($%s$, $6$)"]
BESIDE += ["at least $%s$", "$%s$ times $3$", "$%s$ dozen eggs"]


@pytest.mark.fault("hostile completion")
@pytest.mark.parametrize("sentence", BESIDE)
def test_what_stands_beside_inline_mathematics_counts(sentence: str) -> None:
    with_unit = "5 inches" if "feet" in sentence else "5"
    try:
        assert math_reward(f"The answer is {sentence % '5'}.", with_unit) == 0.0
    except UnparseableError as error:
        assert "must parse" in str(error)  # noqa: PT017 - either outcome is right


PARTS = ["{}\N{SUPERSCRIPT TWO}", "${}$^2", "{}\N{VULGAR FRACTION ONE HALF}", "{}@6", "{}&6", "{}6"]
PARTS += ["-{}", "2{}", "{}x", r"{}\pi", r"{} \times 10^3", "{} million", r"{}\text{{ dozen}}"]
PARTS += [
    "2^{}",
    "{}/3",
    "\N{SQUARE ROOT}{}",
    r"\sqrt[3]{{{}}}",
    r"\frac{{{}}}{{2}}",
    r"\frac{{1}}{{{}}}",
]
PARTS += [r"\pi {}", "{}\N{GREEK SMALL LETTER PI}", "{}\N{MULTIPLICATION SIGN}3", r"{}\div 2"]
PARTS += ["1 + {}", "{} + 1", "{} - 1", "{} * 2", r"{} \sqrt{{2}}"]
PARTS += [r"\pm {}", "\N{PLUS-MINUS SIGN}{}", r"{} \over 2", r"1 \over {}", r"{}_{{2}}", "${}!$"]
PARTS += [
    "not ${}$",
    "half of {}",
    r"\ln {}",
    r"\log_2({})",
    "$x = 12 - {}$",
    "{} or more",
    r"{}\ldots",
]
PARTS += ["\N{EN DASH}{}", "{}\N{ARABIC-INDIC DIGIT SIX}", r"2^{{{}}}"]
PARTS += ["1 / {}", "2 * {}", "2*{}", "({})^2", r"$\left({}\right)^2$", "2({})", "-(({}))"]
PARTS += [r"$x \ne {}$", r"$x \neq {}$", r"\frac{{\boxed{{3}}}}{{{}}}", "minus {}", "at least {}"]
PARTS += ["3 plus ${}$", "less than {}"]


@pytest.mark.fault("hostile completion")
@pytest.mark.parametrize("form", PARTS)
def test_a_box_in_an_expression_is_no_answer(form: str) -> None:
    with pytest.raises(UnparseableError, match="must state an answer"):
        math_reward("so " + form.format(r"\boxed{5}"), "5")


@pytest.mark.parametrize(
    "behind", ["", ".", "!", r"^\circ", r"^{\circ}", r"\%", " cm", r"\text{ cm}", "\n2"]
)
def test_a_box_is_read_alone_beside_words_and_units(behind: str) -> None:
    assert math_reward(rf"x = $\boxed{{5}}${behind}", "5") == 1.0
    assert math_reward(rf"So \boxed{{5}}{behind}", "5") == 1.0


WHOLE = ["So (a)\n* {}", "*Answer* {}", "**Answer:** {}", "so ({}).", r"\({}\)", "it is 5 ({})"]
WHOLE += ["So ({}) feet", r"$x = \left({}\right)$", r"\({}\) and so on"]


@pytest.mark.parametrize(
    "form", [r"\textcolor{{red}}{{{}}}", "- {}", "_{}_", r"\text{{it is }}{}", *WHOLE]
)
def test_a_box_is_read_alone_in_a_colour_a_list_and_words(form: str) -> None:
    assert math_reward(form.format(r"\boxed{5}"), "5") == 1.0


@pytest.mark.parametrize("text", [r"\in 5", r"x \in 5", "\N{ELEMENT OF}5"])
def test_an_element_of_a_number_is_not_read(text: str) -> None:
    assert reward(text, "5") is None


@pytest.mark.parametrize("left", ["m + n", "xy", r"\frac{m}{n}", "x_1 - x_2", r"\alpha + \beta"])
def test_an_equation_in_several_unknowns_states_a_number_and_no_line(left: str) -> None:
    for right in ("113", r"100 + 13 = 113", r"113\text{ cm}"):
        assert reward(f"{left} = {right}", "113") == 1.0
        assert reward(f"{left} = {right}", "13") == 0.0
    assert not reward("113", f"{left} = 113")
    assert reward(f"{left} = 113", f"2({left}) = 226") == 1.0


BOXES = [
    (r"x = $\boxed{2}$ or x = $\boxed{3}$.", "2, 3"),
    (r"\boxed{2} \text{ and } \boxed{3}", "2, 3"),
]
BOXES += [
    (r"$(\boxed{2}, \boxed{3})$", "(2, 3)"),
    (r"$x=\boxed{2}$, $y=\boxed{3}$", "x = 2, y = 3"),
]
BOXES += [(r"\boxed{2}, then \boxed{3}", "3"), (r"\boxed{3}, \boxed{3}", "3")]
BOXES += [
    (r"\boxed{1/2}, or \boxed{0.5}", "1/2"),
    (r"\boxed{A}, \boxed{B} and \boxed{C}", "A, B, C"),
]
BOXES += [(r"$(\boxed{2}, \boxed{2})$", "(2, 2)"), (r"\[\boxed{1}, \boxed{2}\]", "1, 2")]
BOXES += [(r"$x = \boxed{2}, y = \boxed{2}$", "x = 2, y = 2"), (r"\boxed{2}, \boxed{2}", "2")]


@pytest.mark.parametrize(("text", "answer"), BOXES)
def test_boxes_with_a_comma_or_a_word_between_them_are_one_answer(text: str, answer: str) -> None:
    assert math_reward(text, answer) == 1.0
    assert answer == "3" or math_reward(text, "3") == 0.0


@pytest.mark.parametrize("form", ["$({0}, {0})$", r"$\left({0}, {0}\right)$", "x = {0}, y = {0}"])
def test_a_repeated_box_is_no_single_one_in_a_tuple_and_behind_names(form: str) -> None:
    assert math_reward(form.format(r"\boxed{2}"), "2") == 0.0


@pytest.mark.parametrize("form", ["$[{}, {}]$", "$({}, {}]$", r"$\left[{}, {}\right)$"])
@pytest.mark.parametrize("boxes", [(r"\boxed{1}", r"\boxed{2}"), (r"\boxed{1}", r"\boxed{1}")])
def test_boxes_in_an_interval_are_no_answer(form: str, boxes: tuple[str, str]) -> None:
    with pytest.raises(UnparseableError, match="must state an answer"):
        math_reward(form.format(*boxes), "1, 2")


def test_boxes_side_by_side_are_no_answer() -> None:
    with pytest.raises(UnparseableError, match="must state an answer"):
        math_reward(r"\boxed{2}\boxed{3}", "3")


def test_a_percentage_is_no_fraction() -> None:
    for gold in ("0.25", r"\frac14"):
        assert reward(r"25\%", gold) == 1.0
        assert reward(r"0.25\%", gold) == 0.0
    assert reward("0.25", r"0.25\%") == 1.0  # the question may ask for percent
    assert reward(r"25\%", "25") == 1.0


def test_a_fraction_is_the_gold_ratio() -> None:
    assert reward(r"\frac{3}{2}", "3:2") == 1.0
    assert reward("1.5", "3:2") == 1.0
    assert reward("2/3", "3:2") == 0.0
    assert reward("1/3", "10:30") == 0.0
    assert reward("1:4", "1/4") == 0.0  # perhaps odds
