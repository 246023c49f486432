"""Scores one completion in a worker process of the verifier, without torch or transformers."""

import math
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, SupportsFloat

from kdrl_train.output import escape, guard
from kdrl_train.rollouts.rewards import (
    Reward,
    UnparseableError,
    call,
    load_answer,
    load_reward,
    warm_up,
)

if sys.platform == "linux":
    import resource

ORPHAN_GRACE_S = 10.0
"""Seconds past the deadline after which a worker ends by itself, if nobody has killed it."""
MAX_MESSAGE_CHARS = 500
"""Of an error's message; a user's function may quote the whole completion."""
Outcome = Literal["right", "wrong", "unparseable", "timeout", "error"]
"""As batch.Outcome, whose module imports torch."""


class JudgedCompletion(NamedTuple):
    """The verdict on one completion."""

    reward: float
    """The weighted sum; NaN for the outcome `error` and for no other."""
    outcome: Outcome
    message: str = ""
    """Of an error."""
    answer: str | None = None
    """What it votes for."""
    values: tuple[float, ...] = ()
    """Of each reward, without its weight; none for a timeout or an error."""


class JudgeRule(NamedTuple):
    """How a completion is judged: what a worker must know of the settings."""

    functions: tuple[str, ...]
    """The rewards."""
    names: tuple[str, ...] = ("",)
    """Of each reward, for messages; "": it is the only one."""
    weights: tuple[float, ...] = (1.0,)
    deciding: int = 0
    """Place of the reward that says what is right."""
    right_above: float = 0.5
    """A value of it above this is right, where the function gives no verdict."""
    timeout_s: float = 5.0
    """Deadline of a completion."""


def do_nothing() -> None:
    """Return at once: a first task, which makes the pool start its workers."""


def start_worker(functions: Sequence[str], memory_bytes: int | None = None) -> None:
    """Import the rewards and warm them up, outside of any deadline; make SIGTERM end the process.

    memory_bytes: the most that the process may allocate from now on, on Linux; None: no limit.
    """
    # macOS takes the limit and ignores it, Windows has none
    if memory_bytes and sys.platform == "linux":
        # not RLIMIT_AS: CUDA, and each thread of malloc, reserve addresses that nothing ever fills
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        most = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    # A Python handler, such as pebble's, runs between two byte codes, so not while C code (gmpy2,
    # numpy) runs; the whole pool would wait for pebble's 3 seconds of grace before the kill.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout, sys.stderr = map(guard, (sys.stdout, sys.stderr))  # a reward function may print
    for function in functions:
        warm_up(_reward(function))


_reward = lru_cache(maxsize=64)(load_reward)


class _Value(NamedTuple):
    """What one reward says of a completion."""

    value: float
    right: bool | None = None
    """Its own verdict; None: it gives none."""
    vote: str | None = None
    parsed: bool = True
    """False: it raised UnparseableError."""


class _WrongValueError(Exception):
    """A reward has returned what is none."""


def judge(rule: JudgeRule, inputs: dict[str, Any]) -> JudgedCompletion:
    """Score one completion by all rewards.

    It ends the process ORPHAN_GRACE_S past the deadline, where the trainer has not done so.

    inputs: by their names (rewards.INPUTS), those that the rewards take, and the completion.
    """
    has_timer = hasattr(signal, "setitimer")  # not on Windows
    if has_timer:  # SIGALRM ends the process: a hang must not outlive a trainer that was killed
        signal.setitimer(signal.ITIMER_REAL, rule.timeout_s + ORPHAN_GRACE_S)
    values: list[_Value] = []
    try:
        for place, function in enumerate(rule.functions):
            votes = place == rule.deciding
            values.append(_value(_reward(function), inputs, votes=votes))
        reward = sum(w * one.value for w, one in zip(rule.weights, values, strict=True))
        if not math.isfinite(reward):
            raise _WrongValueError(f"the sum of the rewards must be a finite number, got {reward}")
    except Exception as error:  # a user's code may raise anything; the message is kept
        name = rule.names[len(values)] if len(values) < len(rule.names) else ""
        message = f"{name}: {_message(error)}" if name else _message(error)
        return JudgedCompletion(math.nan, "error", escape(message))
    finally:
        if has_timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
    deciding = values[rule.deciding]
    outcome: Outcome = "unparseable"
    if deciding.parsed:
        says = deciding.right
        outcome = (
            "right" if (deciding.value > rule.right_above if says is None else says) else "wrong"
        )
    return JudgedCompletion(reward, outcome, "", deciding.vote, tuple(one.value for one in values))


def _value(reward: Reward, inputs: dict[str, Any], *, votes: bool) -> _Value:
    """Score a completion by one reward, and read the answer that it votes for if it `votes`."""
    try:
        value = call(reward, inputs)
        vote = load_answer(reward)(inputs["completion"]) if votes else None
    except UnparseableError:
        return _Value(0.0, parsed=False)
    if not isinstance(vote, str | None):
        raise _WrongValueError(
            f"the reward's attribute answer must return text or None, got {vote!r}"
        )
    score: object = value
    right: object = None
    rule = "reward must be a finite number"
    if isinstance(value, tuple) and len(value) == 2:
        rule, (score, right) = "(reward, right) must be a finite number and True or False", value
        score = score if right in (True, False) else None
    number = float(score) if isinstance(score, SupportsFloat) else math.nan
    if not math.isfinite(number):
        raise _WrongValueError(f"{rule}, got {value!r}")
    return _Value(number, None if right is None else bool(right), vote)


def _message(error: Exception) -> str:
    """Say what went wrong in a reward: the error and its place, if it raised one."""
    if isinstance(error, _WrongValueError):
        return str(error)[:MAX_MESSAGE_CHARS]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = "more than reward.memory_bytes" if isinstance(error, MemoryError) else str(error)
    message = f"{type(error).__name__}: {text}"[:MAX_MESSAGE_CHARS]
    return f"{message} ({frame.filename}:{frame.lineno})"
