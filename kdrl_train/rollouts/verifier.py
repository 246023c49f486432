"""Scores completions in worker processes, each under a deadline that ends even a hang in C code.

A reward is NaN for one reason alone: the reward function failed, and the outcome is `error`. It
raised, it returned something that is not a finite number, or its worker died.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from kdrl_train.batch import Verdicts
from kdrl_train.config import RewardConfig
from kdrl_train.output import escape
from kdrl_train.rollouts.rewards import inputs_of, load_reward
from kdrl_train.rollouts.verifier_worker import (
    MAX_MESSAGE_CHARS,
    JudgedCompletion,
    JudgeRule,
    do_nothing,
    judge,
    start_worker,
)
from kdrl_train.waiting import POLL_S, Poll

MOST_S = 1.0
"""Most seconds that count between two looks at the tasks: while Ctrl-Z had stopped this process and
its workers, none of them worked."""
STUCK_S = 120.0
"""Longest time in seconds, past a completion's deadline, in which none begins or ends. A worker
that replaces a killed one may take as long to import a reward function."""


class Deadlines:
    """Cancels each task that has run for too long, by a clock that nobody sets.

    pebble's own deadlines follow the time of day: a clock set forward ends them, one set back
    stretches them.

    Args:
        futures: in the order in which the tasks were scheduled, which is that of their starts.
        timeout_s: longest time of one, in seconds.
    """

    def __init__(self, futures: Iterable[ProcessFuture], timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._waiting = deque(futures)
        self._running: dict[ProcessFuture, float] = {}
        self._looked = time.monotonic()
        self._worked = self._moved = 0.0

    @property
    def idle_s(self) -> float:
        """Seconds since a task began or ended."""
        return self._worked - self._moved

    def enforce(self) -> None:
        """Cancel what is late, which kills its worker; call it often."""
        before, self._looked = self._looked, time.monotonic()
        self._worked += min(self._looked - before, MOST_S)
        now = self._worked
        while self._waiting and (self._waiting[0].running() or self._waiting[0].done()):
            self._running[self._waiting.popleft()] = self._moved = now
        for future, start in list(self._running.items()):
            if future.done():
                del self._running[future]
                self._moved = now
            elif now - start > self.timeout_s:
                future.cancel()


class Verifier(AbstractContextManager["Verifier"]):
    """Scores completions in a pool of worker processes; use it as a context manager.

    Every completion is a task of its own. One that passes the deadline costs its worker, which is
    killed and replaced, and no other completion.

    Args:
        config: gives the reward functions, the deadline of a completion, and the number of workers.
    Raises: ValueError for an unknown reward function, and in a script whose work is not under
        `if __name__ == "__main__":`, since each worker imports the script.
    """

    def __init__(self, config: RewardConfig) -> None:
        _check_main_is_guarded()
        # an unknown name must fail here, not in a worker
        rewards = [load_reward(part.function) for part in config.parts]
        self.config = config
        self.inputs = frozenset(name for reward in rewards for name in inputs_of(reward).values())
        """What the rewards take, by names (rewards.INPUTS)."""
        self._closed = False
        self._pool = self._start()

    def score(
        self,
        completions: Sequence[str],
        golds: Sequence[str],
        poll: Poll | None = None,
        more: Sequence[Mapping[str, Any]] | None = None,
    ) -> Verdicts:
        """Score R completions against R gold answers, and wait for all verdicts.

        Args:
            poll: called regularly; an exception it raises stops the waiting.
            more: R, each with the other inputs that the rewards take (see reward_inputs); None:
                they take no others.
        Raises: ValueError where the lengths differ, inputs are missing or the Verifier is closed;
            ChildProcessError where the workers cannot start.
        """
        if self._closed:
            raise ValueError(
                "Verifier must be open to score, got a closed Verifier: create a new one"
            )
        if len(completions) != len(golds):
            raise ValueError(
                f"golds must hold one gold answer per completion, got {len(golds)} for "
                f"{len(completions)} completions: repeat each gold answer group_size times"
            )
        inputs = self._joined(completions, golds, more)
        judged: dict[int, JudgedCompletion] = {}
        restarts = fruitless = 0
        while len(judged) < len(completions):
            before = len(judged)
            judged |= self._judge({i: x for i, x in enumerate(inputs) if i not in judged}, poll)
            if len(judged) < len(completions):  # an idle worker died or stopped: the pool is over
                fruitless = fruitless + 1 if len(judged) == before else 0
                if fruitless == 2:
                    raise ChildProcessError(
                        "verifier workers must start, but all of them died, twice: call the reward "
                        "function by hand on one completion to see why"
                    )
                self._pool.stop()
                self._pool.join()
                self._pool = self._start()
                restarts += 1
        return verdicts_of([judged[i] for i in range(len(completions))], self.config, restarts)

    def _joined(
        self,
        completions: Sequence[str],
        golds: Sequence[str],
        more: Sequence[Mapping[str, Any]] | None,
    ) -> list[dict[str, Any]]:
        """Join what the workers get of each completion. Raises: ValueError for what is missing."""
        rest = self.inputs - {"completion", "answer"}
        pairs = zip(completions, golds, strict=True)
        inputs = [{"completion": text, "answer": gold} for text, gold in pairs]
        if not rest:
            return inputs
        if more is None or len(more) != len(inputs) or any(rest - set(one) for one in more):
            raise ValueError(
                f"more must hold {', '.join(sorted(rest))} of each completion, which the rewards "
                f"take, got {'none' if more is None else f'{len(more)} records'} for "
                f"{len(inputs)} completions: see reward_inputs"
            )
        return [
            one | {name: other[name] for name in rest}
            for one, other in zip(inputs, more, strict=True)
        ]

    def _judge(
        self, inputs: dict[int, dict[str, Any]], poll: Poll | None
    ) -> dict[int, JudgedCompletion]:
        """Judge {index: inputs} in the pool; some are missing where the pool breaks."""
        config, rule = self.config, judge_rule(self.config)
        futures: dict[int, ProcessFuture] = {}
        with contextlib.suppress(RuntimeError):  # raised for a pool that is already broken
            for index, one in inputs.items():
                futures[index] = self._pool.schedule(judge, (rule, one))
        waiting, alive = set(futures.values()), True
        deadlines = Deadlines([self._ready, *futures.values()], config.timeout_s)
        try:
            while waiting and alive:
                if poll is not None:
                    poll()
                deadlines.enforce()
                # read before the last wait, so that verdicts of a pool that breaks now still count
                alive = self._pool.active and not self._is_stuck(deadlines)
                _, waiting = wait(waiting, min(POLL_S, config.timeout_s / 10))
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
        verdicts = {i: _verdict(future) for i, future in futures.items() if future.done()}
        return {i: verdict for i, verdict in verdicts.items() if verdict is not None}

    def _is_stuck(self, deadlines: Deadlines) -> bool:
        """Say whether no worker goes on; those that SIGSTOP has stopped are killed.

        A stopped worker may hold the lock of the pipe that all of them read, or be the only one.
        """
        for pid in list(self._pool._pool_manager.worker_manager.workers):
            if _is_stopped(pid):
                time.sleep(POLL_S)  # after Ctrl-Z and fg this process may go on before the worker
                if _is_stopped(pid):
                    os.kill(pid, signal.SIGKILL)
                    return True
        return self._ready.done() and deadlines.idle_s > STUCK_S + self.config.timeout_s

    def close(self) -> None:
        """Stop the workers and drop pending work. May be called twice."""
        self._closed = True
        self._pool.stop()
        self._pool.join()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> ProcessPool:
        """Start a pool whose workers are forked from a small process, not from this one.

        A fork of this process could copy locks that torch's threads hold at that moment, which is a
        deadlock, and a CUDA context. `spawn`, the only method on Windows, is as safe as
        `forkserver`, but each worker that replaces a killed one imports sympy and builds the
        parser's tables again; the fork server has done both once.
        """
        if "forkserver" in multiprocessing.get_all_start_methods():
            context: Any = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["kdrl_train.rollouts.warm_rewards"])
        else:
            context = multiprocessing.get_context("spawn")
        pool = ProcessPool(
            max_workers=self.config.workers,
            context=context,
            initializer=start_worker,
            initargs=(judge_rule(self.config).functions, self.config.memory_bytes),
        )
        # starts the workers now, while the caller loads its models
        self._ready = pool.schedule(do_nothing)
        return pool


def _is_stopped(pid: int) -> bool:
    """Say whether a process is stopped, as by SIGSTOP; only Linux tells."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:  # it has ended, or this is no Linux
        return False
    return stat.rpartition(b")")[2].split()[0] == b"T"


def _check_main_is_guarded() -> None:
    """Raise ValueError where each worker would start the user's script once more.

    multiprocessing imports the script into new processes, unless it runs as a module (python -m).
    """
    main = sys.modules["__main__"]
    path = Path(getattr(main, "__file__", None) or "")
    is_script = getattr(main, "__spec__", None) is None and path.suffix == ".py" and path.is_file()
    if is_script and "__name__" not in path.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f'{path} must call the trainer under `if __name__ == "__main__":`, got a call outside '
            "of it: the verifier's workers import the script, and would run it once more"
        )


def _verdict(future: ProcessFuture) -> JudgedCompletion | None:
    """Return the verdict on one completion; None: the pool broke before it was judged.

    A worker that was killed at the deadline, or died at work, costs this completion alone.
    """
    if future.cancelled():
        return JudgedCompletion(0.0, "timeout")
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        return None
    died = "worker died: " * isinstance(error, ProcessExpired)  # else a number too large, sys.exit
    text = f"{died}{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS]
    return JudgedCompletion(math.nan, "error", escape(text))


def judge_rule(config: RewardConfig) -> JudgeRule:
    """Take from the settings what a worker must know."""
    parts = config.parts
    return JudgeRule(
        functions=tuple(part.function for part in parts),
        names=tuple(part.label for part in parts) if len(parts) > 1 else ("",),
        weights=tuple(part.weight for part in parts),
        deciding=parts.index(config.deciding),
        right_above=config.right_above,
        timeout_s=config.timeout_s,
    )


def verdicts_of(
    judged: Sequence[JudgedCompletion], config: RewardConfig, restarts: int = 0
) -> Verdicts:
    """Join the verdicts on R completions; the rewards of one that has none are its reward."""
    names = [part.label for part in config.parts]
    values = [one.values or (one.reward,) * len(names) for one in judged]
    return Verdicts(
        rewards=[one.reward for one in judged],
        outcomes=[one.outcome for one in judged],
        errors={i: one.message for i, one in enumerate(judged) if one.message},
        answers=[one.answer for one in judged],
        restarts=restarts,
        parts={name: [value[i] for value in values] for i, name in enumerate(names)},
    )
