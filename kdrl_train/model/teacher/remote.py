"""A teacher behind a URL, asked for many completions at a time, waited for when it is away."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager

from torch import Tensor

from kdrl_train.batch import Rollouts
from kdrl_train.config import TrainConfig
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.schedules import History, schedule_value
from kdrl_train.model.teacher.client import NoAnswerError, Query, TeacherClient, TeacherError
from kdrl_train.waiting import POLL_S, Poll, retry_waits

QUIET_S = 1.0
"""A silence shorter than this is not reported: a full queue is no outage."""


class RemoteTeacher(AbstractContextManager["RemoteTeacher"]):
    """Log-probabilities of completions from a server; use it as a context manager.

    At most config.concurrency completions are on their way. One that gets no answer is asked for
    again; after config.deadline_s without an answer to any, all that are waited for fail.

    Args:
        client: the server; not closed here.
        config: concurrency, deadlines, and the sampling temperature.
        vocab_size: columns from here on are not sampled; None: all are.
        say: where outages are reported, from any thread.
    """

    def __init__(
        self,
        client: TeacherClient,
        config: TrainConfig,
        vocab_size: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.client = client
        self.config = config.teacher
        self.vocab_size = vocab_size
        self.temperature = config.sampling.temperature
        self.say = say
        self._pool = ThreadPoolExecutor(config.teacher.concurrency, thread_name_prefix="teacher")
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._last_answer = time.monotonic()
        self._outage: float | None = None
        self._failure: TeacherError | None = None

    def query(self, rollouts: Rollouts, wanted_R: Tensor) -> dict[int, Future[Tensor]]:
        """Send the completions of wanted_R [R] bool, without waiting for an answer.

        Returns: completion -> its log-probabilities [T] float32, nats.
        """
        return {
            r: self._pool.submit(self._score, self._query(rollouts, r))
            for r in wanted_R.nonzero().flatten().tolist()
        }

    def collect(
        self,
        rollouts: Rollouts,
        wanted_R: Tensor,
        asked: dict[int, Future[Tensor]],
        poll: Poll | None = None,
    ) -> list[Tensor | None]:
        """Wait for the wanted ones; those not asked for so far are asked for now, the unwanted
        dropped.

        Args:
            wanted_R: [R] bool.
            asked: from `ask` with the same rollouts.
            poll: called now and then; what it raises ends the waiting.
        Returns: R of [T] float32 nats, None where not wanted.
        Raises: TeacherError, of the first that failed.
        """
        missing = wanted_R.clone()
        missing[list(asked)] = False
        futures = asked | self.query(rollouts, missing)
        for r, future in futures.items():
            if not wanted_R[r]:
                future.cancel()
        try:
            waiting = {futures[r] for r in wanted_R.nonzero().flatten().tolist()}
            while waiting:
                if poll is not None:
                    poll()
                _, waiting = wait(waiting, POLL_S)
            return [futures[r].result() if wanted_R[r] else None for r in range(len(wanted_R))]
        except TeacherError as error:
            raise self._failure or error from None

    def close(self) -> None:
        """Drop what was asked for; waits for requests on their way. May be called twice."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _query(self, rollouts: Rollouts, r: int) -> Query:
        return Query(
            name=f"completion {r} of the step",
            prompt_ids=rollouts.prompt_ids[r].tolist(),
            completion_ids=rollouts.completion_ids[r].tolist(),
            vocab_size=self.vocab_size,
            temperature=self.temperature,
        )

    def _score(self, query: Query) -> Tensor:
        """[T] nats of one completion, in a thread of the pool."""
        try:
            return self._ask_until_answered(query)
        except TeacherError as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()  # the others wait for nothing
            raise

    def _ask_until_answered(self, query: Query) -> Tensor:
        start, waits = time.monotonic(), retry_waits()
        while not self._stop.is_set():
            left = self.config.deadline_s - self._silence(start)
            try:
                found = self.client.logprobs(query, min(self.config.timeout_s, max(left, 0.1)))
            except NoAnswerError as error:
                self._missed(error, start)
                self._stop.wait(min(max(next(waits), error.wait_s), left))
            else:
                self._answered()
                return found
        raise TeacherError(f"the teacher at {self.client.url} is no longer asked")

    def _silence(self, start: float) -> float:
        """Seconds since its last answer to anybody, or since a query's start if that was later."""
        return time.monotonic() - max(start, self._last_answer)

    def _missed(self, error: NoAnswerError, start: float) -> None:
        """Report an outage, once; raise TeacherError past the deadline."""
        silence, deadline_s = self._silence(start), self.config.deadline_s
        if silence >= deadline_s:
            raise TeacherError(
                f"the teacher at {self.client.url} must answer within teacher.deadline_s = "
                f"{deadline_s:g} s, got {error}: start it again, and continue with --resume"
            )
        with self._lock:
            report = self._outage is None and silence > QUIET_S
            if report:
                self._outage = time.monotonic() - silence
        if report:
            self.say(
                f"the teacher at {self.client.url} does not answer, {error}: "
                f"waiting for it, {deadline_s:g} s at most"
            )

    def _answered(self) -> None:
        with self._lock:
            self._last_answer = time.monotonic()
            outage, self._outage = self._outage, None
        if outage is not None:
            silence = self._last_answer - outage
            self.say(f"the teacher at {self.client.url} is back after {silence:.0f} s")


def may_ask_early(method: MethodConfig, step: int, history: History) -> bool:
    """Whether each completion of the step is distilled whatever its reward, so that the teacher can
    score while the rewards are computed. Otherwise it must wait for them: a completion that is not
    distilled costs no call."""
    return (
        method.kd is not None
        and method.kd_mask == "none"
        and method.kd_coef.kind != "reward_adaptive"
        and schedule_value(method.kd_coef, step, history) > 0
    )
