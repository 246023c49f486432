"""rewards: which text is the answer, which answers are equal, which gold answers are refused."""

import math
import subprocess
import sys

import pytest

from kdrl_train.rollouts import rewards
from kdrl_train.rollouts.rewards import (
    MAX_ANSWER_CHARS,
    UnparseableError,
    check_readable,
    exact_reward,
    last_answer,
    load_answer,
    load_reward,
    math_reward,
)
from kdrl_train.rollouts.verifier_worker import JudgeRule, judge
from tests.train.scripted_rewards import always_right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{4}, no: \boxed{ 5 }", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x = \boxed{3}}", "3"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\fbox{204} minutes", "204"),
        (r"a line\\ and { an open brace, \boxed{7}", "7"),
        (r"}} stray braces \boxed{7}", "7"),
        (r"\boxed{1}" + "\n#### 2", "1"),
        (r"\boxed{}", ""),
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1\n#### 2\nthe end", "2"),
        ("#### Step 1\nAdd. The answer is 9.", "9"),
        ("The answer is 4.\n#### 5", "5"),
        ("The answer is -5.5. Done.", "-5.5"),
        ("The answer is therefore 5.", "5"),
        ("The answer is not 4. The answer is 5.", "5"),
        ("The final answer to this is: **1,234**.", "1,234"),
        ("**Answer:** 18 dollars per day.", "18 dollars per day"),
        ("Answer:\n$$12$$", "12"),
        (r"the answer is \(\frac{1}{2}\) of it", r"\frac{1}{2}"),
        ("the answer is 3. And the answer is", "3"),
        (r"the answer is $2$ or $3$.", "2, 3"),
        (r"The answer is 2$\pi$.", r"2 \pi"),
        (r"The answer is not $5$.", "not  5"),
        ("The answer is 18 dollars. Since $x = 3$", "18 dollars"),
        (r"<think>\boxed{5}? No.</think>The answer is 7.", "7"),
        (r"\boxed{5}? No.</think>" + "\n#### 7", "7"),
        (r"<think>The answer is 4</think>\boxed{5}", "5"),
        (r"<think>It is \boxed{5}</think>Done.", "5"),
        (r"<think>It is \boxed{5}", "5"),
        (r"</think>\boxed{5}</think>The answer is", "5"),
        ("so 3 + 4 = 7", None),
        ("The answer is", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_last_statement_is_the_answer(text: str, answer: str | None) -> None:
    assert last_answer(text) == answer


@pytest.mark.parametrize(
    ("stated", "gold"),
    [
        ("1,234", "1234"),
        ("1{,}234.0", "1,234"),
        ("025", "25"),
        ("27", "27.0"),
        (r"\$18", "18"),
        ("18 dollars per day", "18"),
        (r"18\text{ dollars}", "18"),
        ("\N{MINUS SIGN}7", "-7"),
        (".5", r"\frac{1}{2}"),
        ("0.333333", "1/3"),
        (r"\frac{\sqrt{12}}{2}", r"\sqrt{3}"),
        ("x = 5", "5"),
        (r"\{2, 1\}", "1, 2"),
        (r"x \in [0, 1]", "[0,1]"),
        ("(x+1)^2", "x^2 + 2x + 1"),
        ("Monday", "Monday"),
    ],
)
def test_equal_answers_in_different_spellings(stated: str, gold: str) -> None:
    assert math_reward(rf"so \boxed{{{stated}}}", gold) == 1.0


@pytest.mark.parametrize(
    ("stated", "gold"),
    [
        ("1,235", "1234"),
        ("7", "-7"),
        ("27.1", "27"),
        ("1.0000001", "1"),
        ("1,2", "12"),
        ("x + 1", "1"),
        ("18 million", "18"),
        ("(2, 1)", "(1, 2)"),
        (r"\frac{1}{3}", "0.34"),
        (r"\infty", "5"),
        ("1/0", "0"),
        ("no", "yes"),
    ],
)
def test_different_answers(stated: str, gold: str) -> None:
    assert math_reward(rf"so \boxed{{{stated}}}", gold) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "I would say 18",
        r"\boxed{}",
        r"\boxed{\frac{}}",
        r"\boxed{" + "9" * 1_000_000 + "}",
        r"\boxed{" + "{" * 9 + "5" + "}" * 9 + "}",
        "{" * 1_000_000,
        r"\boxed{" * 100_000,
        "answer: " * 100_000,
        "the answer is " + "\n" * 1_000_000,
        "the answer is \ud800",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_no_readable_answer_is_told_apart_from_a_wrong_one(text: str) -> None:
    with pytest.raises(UnparseableError, match=r"must (state an answer|parse)"):
        math_reward(text, "18")


@pytest.mark.parametrize("answer", ["", "  ", "#", r"\frac{", "9" * (MAX_ANSWER_CHARS + 1)])
def test_a_gold_answer_that_does_not_parse_is_an_error(answer: str) -> None:
    expected = r"gold answer must be .* got .*correct the record, name another data.answer_column"
    with pytest.raises(ValueError, match=expected):
        check_readable(answer)
    with pytest.raises(ValueError, match=expected):
        math_reward(r"\boxed{5}", answer)


def test_exact_reward_reads_letter_by_letter() -> None:
    assert exact_reward("#### 18 ", " 18") == 1.0
    assert exact_reward("#### 18.0", "18") == 0.0
    with pytest.raises(UnparseableError, match="must state an answer"):
        exact_reward("18", "18")


@pytest.mark.parametrize(
    "same",
    [
        ["0.5", ".50", "1/2", r"\frac{1}{2}", r"\dfrac12", r"\frac{2}{4}"],
        ["1,234", "1234.0", "1234"],
        ["x + 1", "1+x", r"\left(x+1\right)"],
        [r"\{1, 2\}", r"\{2,1\}"],
        [r"\pm 2", "2, -2"],
        ["(5, 3)", "x = 5, y = 3", r"\langle 5, 3 \rangle"],
        [r"\log_2 4", "2", r"AB = 2"],
        [r"\pi", "pi"],
    ],
    ids=lambda same: same[0],
)
def test_equal_answers_vote_together(same: list[str]) -> None:
    read = load_answer(math_reward)
    votes = {read(rf"so \boxed{{{answer}}}") for answer in same}
    assert len(votes) == 1
    assert votes.isdisjoint({None, read(r"\boxed{7}")})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 5, y = 3", "x = 3, y = 5"),
        (r"e^{\pi\sqrt{163}}", "262537412640768744"),
        ("e^{-500}", "e^{-501}"),
        ("|x|", "x"),
        ("x + 1", "y + 1"),
    ],
)
def test_different_answers_vote_apart(one: str, other: str) -> None:
    read = load_answer(math_reward)
    assert read(rf"\boxed{{{one}}}") != read(rf"\boxed{{{other}}}")


def test_a_completion_without_an_answer_has_no_vote() -> None:
    read = load_answer(math_reward)
    assert [read(text) for text in ("so 3 + 4 = 7", r"\boxed{}", r"\boxed{\frac{}}")] == [None] * 3
    assert load_answer(exact_reward)("#### 1.0") == "1.0"
    assert load_answer(always_right)("#### 1.0") == "1.0"


def test_load_reward_by_name() -> None:
    assert load_reward("math") is math_reward
    assert load_reward("exact") is exact_reward
    assert load_reward("kdrl_train.rollouts.rewards:exact_reward") is exact_reward


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("maths", "got 'maths'"),
        ("", "got ''"),
        ("json:", "got 'json:'"),
        ("no_such_module:reward", "No module named 'no_such_module'; install it"),
        ("json:reward", "reward is missing from json; name a function"),
        ("math:pi", "pi is not callable in math; name a function"),
    ],
)
def test_an_unknown_reward_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"reward\.function must be math, exact or ") as error:
        load_reward(name)
    assert reason in str(error.value)


def test_import_is_light() -> None:
    """Every worker process imports this module, and must not pay for torch."""
    heavy = "{'torch', 'transformers', 'sympy', 'pebble'}"
    code = f"import kdrl_train.rollouts.rewards, sys; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_is_too_deep_for_the_stack_is_unparseable(monkeypatch: pytest.MonkeyPatch) -> None:
    def recurse(*_: object) -> bool:
        raise RecursionError

    monkeypatch.setattr(rewards, "spelling", recurse)
    assert rewards.load_answer(rewards.math_reward)(r"\boxed{x+1}") is None
    monkeypatch.setattr(rewards, "equal", recurse)
    with pytest.raises(rewards.UnparseableError, match=r"must parse, got 'x\+1'"):
        rewards.math_reward(r"\boxed{x+1}", "x+2")


def test_large_integers_have_a_vote_and_no_error() -> None:
    """Python refuses to write integers of more than 4,300 digits."""
    read = load_answer(math_reward)
    assert read(r"\boxed{10^{4999}}") == read(r"\boxed{10 \cdot 10^{4998}}") is not None
    assert read(r"\boxed{10^{4999}}") != read(r"\boxed{10^{4998}}")
    assert math_reward(r"\boxed{10^{4999}}", "5") == 0.0
    assert math_reward(r"\boxed{3^{10000}}", "9^{5000}") == 1.0


def subject(completion: str, *answers: str) -> float:
    """Take a completion and any number of others."""
    return float(len(answers) + len(completion))


OTHERS = ["os:popen", "os:system", "os:execlp", "timeit:timeit", "shutil:copy", "builtins:eval"]
OTHERS += ["subprocess:getstatusoutput", "subprocess:Popen", "cProfile:run", "runpy:run_path"]
OTHERS += [f"{__name__}:subject", "operator:eq", "functools:partial"]


@pytest.mark.fault("hostile config or data")
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_reward_is_refused(name: str) -> None:
    """Each would be called with a completion; most of these would run it."""
    with pytest.raises(ValueError, match=r"must be .* with the parameters \(completion, answer\)"):
        load_reward(name)


@pytest.mark.fault("hostile config or data")
@pytest.mark.parametrize("name", ["..os:popen", "os.:popen", ":f", "a b:f", "os:", "-:f"])
def test_what_is_no_name_of_a_function_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"reward\.function must be math, exact or module:function"
    ):
        load_reward(name)


def test_unused_parameters_and_defaults_make_a_reward() -> None:
    assert load_reward("tests.train.scripted_rewards:always_right") is always_right


@pytest.mark.fault("reward function")
def test_a_vote_that_is_no_text_is_an_error_of_the_function() -> None:
    """It ended the run when votes were counted."""
    rule = JudgeRule(("tests.train.scripted_rewards:votes_a_list",))
    judged = judge(rule, {"completion": "ab", "answer": "1"})
    message = "the reward's attribute answer must return text or None, got ['a', 'b']"
    assert (math.isnan(judged.reward), *judged[1:4]) == (True, "error", message, None)
