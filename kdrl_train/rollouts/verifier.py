"""Scoring completions in worker processes, each under a deadline that a hang cannot outlive."""

import contextlib
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from typing import Any

from pebble import ProcessFuture, ProcessPool

from kdrl_train.batch import Verdicts
from kdrl_train.config import RewardConfig
from kdrl_train.rollouts.rewards import load_reward
from kdrl_train.rollouts.verifier_worker import Judged, do_nothing, judge, start_worker
from kdrl_train.waiting import POLL_S, Poll


class Verifier(AbstractContextManager["Verifier"]):
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

    def score(
        self,
        completions: Sequence[str],
        answers: Sequence[str],
        poll: Poll | None = None,
    ) -> Verdicts:
        """Score R completions against R gold answers; waits for all of them.

        Args:
            poll: called now and then; what it raises ends the waiting.
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
        judged: dict[int, Judged] = {}
        restarts = 0
        while len(judged) < len(completions):
            pairs = zip(completions, answers, strict=True)
            judged |= self._judge({i: p for i, p in enumerate(pairs) if i not in judged}, poll)
            if len(judged) < len(completions):  # a worker died while idle, which ends the pool
                if restarts:
                    raise ChildProcessError(
                        "verifier workers must start, but all of them died, twice: call the reward "
                        "function by hand on one completion to see why"
                    )
                self._pool = self._start()
                restarts += 1
        verdicts = Verdicts(rewards=[], outcomes=[], restarts=restarts)
        for index in range(len(completions)):
            reward, outcome, message, given = judged[index]
            verdicts.rewards.append(reward)
            verdicts.outcomes.append(outcome)
            verdicts.answers.append(given)
            if message:
                verdicts.errors[index] = message
        return verdicts

    def _judge(self, pairs: dict[int, tuple[str, str]], poll: Poll | None) -> dict[int, Judged]:
        """What the pool answers for {index: (completion, answer)}; less than all if it breaks."""
        function, timeout_s = self.config.function, self.config.timeout_s
        futures: dict[int, ProcessFuture] = {}
        with contextlib.suppress(RuntimeError):  # pebble's word for a pool that is broken already
            for index, pair in pairs.items():
                futures[index] = self._pool.schedule(
                    judge, args=(function, *pair, timeout_s), timeout=timeout_s
                )
        waiting, alive = set(futures.values()), True
        try:
            while waiting and alive:
                if poll is not None:
                    poll()
                alive = self._pool.active  # before the last look: what a broken pool answers counts
                _, waiting = wait(waiting, POLL_S)
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
        found = {i: _verdict(future) for i, future in futures.items() if future.done()}
        return {i: verdict for i, verdict in found.items() if verdict is not None}

    def close(self) -> None:
        """Stop the workers; pending work is dropped. May be called twice."""
        self._closed = True
        self._pool.stop()
        self._pool.join()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> ProcessPool:
        # forkserver: the workers are forked from a small process of one thread. Forking this one
        # could copy locks that torch's threads hold at that moment (a deadlock) and a CUDA context;
        # spawn (the only one on Windows) is as safe, but pays the import of sympy and the parser's
        # tables, two seconds, for each worker that a hang costs, where the server has paid once.
        if "forkserver" in multiprocessing.get_all_start_methods():
            context: Any = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["kdrl_train.rollouts.warm_rewards"])
        else:
            context = multiprocessing.get_context("spawn")
        pool = ProcessPool(
            max_workers=self.config.workers,
            context=context,
            initializer=start_worker,
            initargs=(self.config.function,),
        )
        pool.schedule(do_nothing)  # starts the workers now, while the caller loads its models
        return pool


def _verdict(future: ProcessFuture) -> Judged | None:
    """Of one completion that is done with; None: the pool broke. A worker that was killed or died
    at work costs this completion alone."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, FutureTimeoutError):
        return 0.0, "timeout", "", None
    if isinstance(error, BrokenProcessPool):
        return None
    return math.nan, "error", f"worker died: {type(error).__name__}: {error}", None
