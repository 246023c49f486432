"""The worker's side of the verifier: scores one completion, without torch or transformers."""

import math
import signal
import traceback
from functools import lru_cache
from typing import Literal, SupportsFloat

from kdrl_train.rollouts.rewards import UnparseableError, load_answer, load_reward, warm_up

ORPHAN_GRACE_S = 10.0
"""Seconds past the deadline after which a worker that nobody has killed ends by itself."""
Judged = tuple[float, Literal["right", "wrong", "unparseable", "timeout", "error"], str, str | None]
"""The verdict on one completion: reward, outcome, message of an error, answer that it votes for."""


def do_nothing() -> None:
    """A task without work."""


def start_worker(function: str) -> None:
    """Import the reward and warm it up outside of any deadline; die at once when told to."""
    # pebble's own handler runs between two byte codes, so not while C code (gmpy2, numpy) works on;
    # the whole pool would stand still for its 3 seconds of grace before the kill.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warm_up(_reward(function))


_reward = lru_cache(maxsize=1)(load_reward)


def judge(function: str, completion: str, answer: str, timeout_s: float) -> Judged:
    """Score one completion; ends the process where the deadline has long passed."""
    has_timer = hasattr(signal, "setitimer")  # not on Windows
    if has_timer:  # SIGALRM ends the process: a hang must not outlive a trainer that was killed
        signal.setitimer(signal.ITIMER_REAL, timeout_s + ORPHAN_GRACE_S)
    try:
        reward_function = _reward(function)
        value = reward_function(completion, answer)
        vote = load_answer(reward_function)(completion)
    except UnparseableError:
        return 0.0, "unparseable", "", None
    except Exception as error:  # anybody's code: counted, message kept, the reward becomes NaN
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}:{frame.lineno}"
        return math.nan, "error", f"{type(error).__name__}: {error} ({where})", None
    finally:
        if has_timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
    reward = float(value) if isinstance(value, SupportsFloat) else math.nan
    if not math.isfinite(reward):
        return math.nan, "error", f"reward must be a finite number, got {value!r}", None
    return reward, "right" if reward > 0 else "wrong", "", vote
