"""Rewards of the loop's tests; a module of their own, since verifier workers import it whole."""

import math
import os
import sys


def early_bytes(completion: str, answer: str) -> float:
    """1 where most characters are ASCII: about half of the completions of a random model."""
    assert int(answer) >= 0
    return float(sum(char.isascii() for char in completion) > len(completion) / 2)


def format_pays(completion: str, answer: str) -> float:
    return 0.1 + early_bytes(completion, answer)


def one_missing(completion: str, answer: str) -> float:
    return early_bytes(completion, answer) if completion[:1].isascii() else math.nan


def fails_on_three(completion: str, answer: str) -> float:
    if answer == "3" and completion != r"\boxed{3}":  # the preflight would find it
        raise ValueError("three is [unlucky]")
    return early_bytes(completion, answer)


def always_right(_completion: str, _answer: str) -> float:
    return 1.0


def imported_reward(completion: str, answer: str) -> bool:
    """Whether the worker has imported the module that the completion names."""
    return completion in sys.modules and not answer


def pid_reward(completion: str, answer: str) -> int:
    assert completion == answer
    return os.getpid()


def votes_a_list(completion: str, answer: str) -> float:
    return early_bytes(completion, answer)


votes_a_list.answer = list  # type: ignore[attr-defined]


def first_byte_wins(completion: str, answer: str) -> float:
    """As early_bytes, and says how its answers are counted: by their first character."""
    return early_bytes(completion, answer)


first_byte_wins.answer = lambda completion: completion[:1] or None  # type: ignore[attr-defined]


def half_a_character(completion: str, answer: str) -> float:
    """Raises a message, and returns answers that count, which no file in UTF-8 can hold."""
    if not completion[:1].isascii():
        raise ValueError(f"half \ud800 of {answer} \x1b[2J {completion}")
    return early_bytes(completion, answer)


half_a_character.answer = lambda completion: f"\udfff{completion[:1]}"  # type: ignore[attr-defined]


def short(tokens: list[int]) -> float:
    """1 for a token, less for more of them."""
    return 1 / len(tokens)


def sees(
    completion: str,
    gold: str,
    /,
    prompt: str,
    columns: dict[str, dict[str, str]],
    *,
    tokens: list[int],
    raw_completion: str,
    truncated: bool,
    least: float = 0.25,
) -> float:
    """1 where all that it gets fits together; `least` keeps its default."""
    assert (type(columns), type(tokens), type(truncated)) == (dict, list, bool)
    end = "" if truncated else "<|endoftext|>"
    fits = prompt == f"{gold}+0=" and columns["set"]["gold"] == gold
    fits &= (raw_completion, len(tokens)) == (completion + end, len(completion) + bool(end))
    return max(float(fits), least)


def fails_on_b(completion: str) -> tuple[float, bool]:
    """Always right, but for what begins with b, of which it knows nothing."""
    if completion.startswith("b"):
        raise KeyError("b")
    return (-0.5 if completion.startswith("-") else 0.5), True


def hangs(raw_completion: str) -> float:
    return float(sum(range(10**12))) if raw_completion == "hang" else 1.0
