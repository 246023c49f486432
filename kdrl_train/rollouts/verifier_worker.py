"""Scores one completion in a worker process of the verifier, without torch or transformers."""

import math
import signal
import sys
import traceback
from functools import lru_cache
from typing import Literal, SupportsFloat

from kdrl_train.output import escape, guard
from kdrl_train.rollouts.rewards import UnparseableError, load_answer, load_reward, warm_up

if sys.platform == "linux":
    import resource

ORPHAN_GRACE_S = 10.0
"""Seconds past the deadline after which a worker ends by itself, if nobody has killed it."""
MAX_MESSAGE_CHARS = 500
"""Of an error's message; a user's function may quote the whole completion."""
Judged = tuple[float, Literal["right", "wrong", "unparseable", "timeout", "error"], str, str | None]
"""The verdict on one completion: its reward, which is NaN for the outcome `error` and for no other;
its outcome; the message of an error; and the answer that it votes for."""


def do_nothing() -> None:
    """Return at once: a first task, which makes the pool start its workers."""


def start_worker(function: str, memory_bytes: int | None = None) -> None:
    """Import the reward and warm it up, outside of any deadline; make SIGTERM end the process.

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
    warm_up(_reward(function))


_reward = lru_cache(maxsize=1)(load_reward)


def judge(
    function: str, completion: str, gold: str, timeout_s: float, right_above: float = 0.5
) -> Judged:
    """Score one completion against its gold answer.

    It ends the process ORPHAN_GRACE_S past the deadline, where the trainer has not done so.

    right_above: a reward above it is right, where the function gives no verdict.
    """
    has_timer = hasattr(signal, "setitimer")  # not on Windows
    if has_timer:  # SIGALRM ends the process: a hang must not outlive a trainer that was killed
        signal.setitimer(signal.ITIMER_REAL, timeout_s + ORPHAN_GRACE_S)
    try:
        reward_function = _reward(function)
        value = reward_function(completion, gold)
        vote = load_answer(reward_function)(completion)
    except UnparseableError:
        return 0.0, "unparseable", "", None
    except Exception as error:  # a user's code may raise anything; the message is kept
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = f"{frame.filename}:{frame.lineno}"
        text = "more than reward.memory_bytes" if isinstance(error, MemoryError) else str(error)
        message = f"{type(error).__name__}: {text}"[:MAX_MESSAGE_CHARS]
        return math.nan, "error", escape(f"{message} ({line})"), None
    finally:
        if has_timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
    if not isinstance(vote, str | None):
        rule = "the reward's attribute answer must return text or None"
        return math.nan, "error", escape(f"{rule}, got {vote!r}"[:MAX_MESSAGE_CHARS]), None
    score: object = value
    right: object = None
    rule = "reward must be a finite number"
    if isinstance(value, tuple) and len(value) == 2:
        rule, (score, right) = "(reward, right) must be a finite number and True or False", value
        score = score if right in (True, False) else None
    reward = float(score) if isinstance(score, SupportsFloat) else math.nan
    if not math.isfinite(reward):
        return math.nan, "error", escape(f"{rule}, got {value!r}"[:MAX_MESSAGE_CHARS]), None
    right = reward > right_above if right is None else right
    return reward, "right" if right else "wrong", "", vote
