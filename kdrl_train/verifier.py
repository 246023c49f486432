"""Scoring completions in worker processes, each under a deadline that a hang cannot outlive."""

import math
import multiprocessing
import signal
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Any, Literal, Self, SupportsFloat

from pebble import ProcessFuture, ProcessPool

from kdrl_train.config import RewardConfig
from kdrl_train.rewards import UnparseableError, load_answer, load_reward, warm_up

Outcome = Literal["right", "wrong", "unparseable", "timeout", "error"]
ORPHAN_GRACE_S = 10.0
"""Seconds past the deadline after which a worker that nobody has killed ends by itself."""
OUTCOMES: tuple[Outcome, ...] = ("right", "wrong", "unparseable", "timeout", "error")
Judged = tuple[float, Outcome, str, str | None]
"""Of one completion: reward, outcome, message of an error, answer."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What became of R completions, in their order."""

    rewards: list[float]
    """[R]. timeout and unparseable: 0.0. error: NaN, so that nobody learns from it unseen."""
    outcomes: list[Outcome]
    """[R]. right: reward above 0; wrong: 0 or below; the rest as counted by `counts`."""
    errors: dict[int, str] = field(default_factory=dict)
    """Index of a completion with outcome `error` -> what its reward raised or returned."""
    answers: list[str | None] = field(default_factory=list)
    """[R]. The answer in the spelling it votes for (rewards.load_answer); None: there is none."""

    @property
    def counts(self) -> dict[str, int]:
        """Completions per outcome, every outcome present; the values sum to R."""
        found = Counter(self.outcomes)
        return {outcome: found[outcome] for outcome in OUTCOMES}

    @classmethod
    def join(cls, parts: Sequence["Verdicts"]) -> "Verdicts":
        """All of them, in the order of the parts; errors keep their completion."""
        joined = cls(rewards=[], outcomes=[])
        for part in parts:
            start = len(joined.rewards)
            joined.errors.update({start + i: text for i, text in part.errors.items()})
            joined.rewards.extend(part.rewards)
            joined.outcomes.extend(part.outcomes)
            joined.answers.extend(part.answers)
        return joined


class Verifier:
    """A pool of worker processes that scores completions; use it as a context manager.

    A completion that passes the deadline costs its worker, which is killed and replaced, and
    nothing else: every completion is a task of its own (0.1 to 0.2 ms each).

    Args:
        config: reward function, deadline in seconds per completion, number of processes.
    Raises: ValueError for an unknown reward function.
    """

    def __init__(self, config: RewardConfig) -> None:
        load_reward(config.function)  # fail here, with the remedy, and not in a worker
        self.config = config
        self._closed = False
        self._pool = self._start()

    def score(self, completions: Sequence[str], answers: Sequence[str]) -> Verdicts:
        """Score R completions against R gold answers; waits for all of them.

        Raises: ValueError where the lengths differ or the Verifier is closed; ChildProcessError
            where the workers cannot start.
        """
        if self._closed:
            raise ValueError("Verifier must be open to score, got a closed one: make a new one")
        if len(completions) != len(answers):
            raise ValueError(
                f"answers must hold one gold answer per completion, got {len(answers)} for "
                f"{len(completions)} completions: repeat each answer group_size times"
            )
        if not self._pool.active:  # a worker was killed from outside while idle
            self._pool = self._start()
        futures = [
            self._pool.schedule(
                _score_one,
                args=(self.config.function, completion, answer, self.config.timeout_s),
                timeout=self.config.timeout_s,
            )
            for completion, answer in zip(completions, answers, strict=True)
        ]
        verdicts = Verdicts(rewards=[], outcomes=[])
        for index, future in enumerate(futures):
            reward, outcome, message, given = _verdict(future)
            verdicts.rewards.append(reward)
            verdicts.outcomes.append(outcome)
            verdicts.answers.append(given)
            if message:
                verdicts.errors[index] = message
        return verdicts

    def close(self) -> None:
        """Stop the workers; pending work is dropped. May be called twice."""
        self._closed = True
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> ProcessPool:
        # forkserver: the workers are forked from a small process of one thread. Forking this one
        # could copy locks that torch's threads hold at that moment (a deadlock) and a CUDA context;
        # spawn (the only one on Windows) is as safe, but pays the import of sympy and the parser's
        # tables, two seconds, for each worker that a hang costs, where the server has paid once.
        if "forkserver" in multiprocessing.get_all_start_methods():
            context: Any = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["kdrl_train.warm_rewards"])
        else:
            context = multiprocessing.get_context("spawn")
        pool = ProcessPool(
            max_workers=self.config.workers,
            context=context,
            initializer=_start_worker,
            initargs=(self.config.function,),
        )
        pool.schedule(_ready)  # starts the workers now, while the caller loads its models
        return pool


def _ready() -> None:
    """A task without work."""


def _start_worker(function: str) -> None:
    """Import the reward and warm it up outside of any deadline; die at once when told to."""
    # pebble's own handler runs between two byte codes, so not while C code (gmpy2, numpy) works on;
    # the whole pool would stand still for its 3 seconds of grace before the kill.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warm_up(_reward(function))


_reward = lru_cache(maxsize=1)(load_reward)


def _score_one(function: str, completion: str, answer: str, timeout_s: float) -> Judged:
    """In a worker: one completion."""
    has_timer = hasattr(signal, "setitimer")  # not on Windows
    if has_timer:  # SIGALRM ends the process: a hang must not outlive a trainer that was killed
        signal.setitimer(signal.ITIMER_REAL, timeout_s + ORPHAN_GRACE_S)
    try:
        judge = _reward(function)
        value, given = judge(completion, answer), load_answer(judge)(completion)
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
    return reward, "right" if reward > 0 else "wrong", "", given


def _verdict(future: ProcessFuture) -> Judged:
    """Wait for one completion. A worker that was killed or died costs this completion alone."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, FutureTimeoutError):
        return 0.0, "timeout", "", None
    if isinstance(error, BrokenProcessPool):
        raise ChildProcessError(
            "verifier workers must start, but all of them died: call the reward function "
            "by hand on one completion to see why"
        ) from error
    return math.nan, "error", f"worker died: {type(error).__name__}: {error}", None
