"""Queries a teacher behind a URL for many completions at a time, and waits while it is away."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

from torch import Tensor

from kdrl_train.batch import Rollouts, TeacherReply
from kdrl_train.config import TrainConfig
from kdrl_train.exchange import NoReplyError
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.schedules import History, schedule_value
from kdrl_train.model.teacher.client import KdrlClient, Query, TeacherClient, TeacherError
from kdrl_train.model.teacher.head import ServedHead
from kdrl_train.model.teacher.openai import PoolingClient
from kdrl_train.waiting import POLL_S, Poll, retry_waits

T = TypeVar("T")
QUIET_S = 1.0
"""A shorter time without a reply, in seconds, is not reported: a full queue is no outage."""


class RemoteTeacher(AbstractContextManager["RemoteTeacher"]):
    """Gets from a server what the method reads of the teacher; use it as a context manager.

    At most config.concurrency queries are open at a time. A query without a reply is sent again;
    after config.deadline_s without a reply to any query, all pending ones fail.

    Args:
        client: talks to the server; `close` closes it.
        config: gives concurrency, deadlines, and the sampling temperature.
        sampled_vocab_size: columns from here on are not sampled; None: all are.
        say: reports outages; it is called from any thread.
        head: what reads the states that the server sends, where the method needs them.
    """

    def __init__(
        self,
        client: TeacherClient,
        config: TrainConfig,
        sampled_vocab_size: int | None,
        say: Callable[[str], None],
        head: ServedHead | None = None,
    ) -> None:
        self.client = client
        self.head = head
        self.method = config.method
        self.half = config.model.dtype == "bfloat16"
        self.config = config.teacher
        self.sampled_vocab_size = sampled_vocab_size
        self.temperature = config.sampling.temperature
        self.say = say
        self._pool = ThreadPoolExecutor(config.teacher.concurrency, thread_name_prefix="teacher")
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._last_reply = time.monotonic()
        self._outage: float | None = None
        self._failure: TeacherError | None = None

    def query(self, rollouts: Rollouts, selected_R: Tensor) -> dict[int, Future[TeacherReply]]:
        """Send the completions selected by selected_R [R] bool, without waiting for a reply.

        Returns: completion -> the future of the server's reply.
        """
        return {
            r: self._pool.submit(self._send, partial(self._read, self._query(rollouts, r)))
            for r in selected_R.nonzero().flatten().tolist()
        }

    def collect(
        self,
        rollouts: Rollouts,
        selected_R: Tensor,
        pending: dict[int, Future[TeacherReply]],
        poll: Poll | None = None,
    ) -> list[TeacherReply | None]:
        """Wait for the replies to the selected completions.

        Those that are not pending yet are sent now; pending ones that are not selected are dropped.

        Args:
            selected_R: [R] bool.
            pending: what `query` returned for the same rollouts; may be empty.
            poll: called regularly; an exception it raises stops the waiting.
        Returns: R of them, None where not selected.
        Raises: TeacherError, that of the first query that failed.
        """
        missing_R = selected_R.clone()
        missing_R[list(pending)] = False
        futures = pending | self.query(rollouts, missing_R)
        for r, future in futures.items():
            if not selected_R[r]:
                future.cancel()
        try:
            selected = selected_R.nonzero().flatten().tolist()
            _wait({futures[r] for r in selected}, poll)
            if selected:
                same = self._pool.submit(self._send, self.client.require_same)
                _wait({same}, poll)
                same.result()
            return [
                futures[r].result() if is_selected else None
                for r, is_selected in enumerate(selected_R.tolist())
            ]
        except TeacherError as error:
            raise self._failure or error from None

    def close(self) -> None:
        """Drop pending queries, and stop the open requests of the client. May be called twice."""
        self._stop.set()
        self.client.close()
        self._pool.shutdown(cancel_futures=True)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _query(self, rollouts: Rollouts, r: int) -> Query:
        return Query(
            name=f"completion {r} of the step",
            prompt_ids=rollouts.prompt_ids[r].tolist(),
            completion_ids=rollouts.completion_ids[r].tolist(),
            sampled_vocab_size=self.sampled_vocab_size,
            temperature=self.temperature,
        )

    def _send(self, request: Callable[[float], T]) -> T:
        """Return the reply to a request, which takes its timeout; runs in a thread of the pool."""
        try:
            return self._reply_to(request)
        except TeacherError as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()  # the other queries need not wait
            raise

    def _read(self, query: Query, timeout_s: float) -> TeacherReply:
        """Send one query for what the method reads. States have at most the run's precision."""
        if self.method.reads_logprobs:
            return self.client.logprobs(query, timeout_s)
        if self.method.is_topk:
            assert isinstance(self.client, KdrlClient)
            columns = query.sampled_vocab_size or self.method.kd_topk
            return self.client.topk(query, min(self.method.kd_topk, columns), timeout_s)
        assert isinstance(self.client, KdrlClient | PoolingClient)
        states = self.client.states(query, timeout_s)
        return states.bfloat16() if self.half else states

    def _reply_to(self, request: Callable[[float], T]) -> T:
        """Send a request until a reply comes, the deadline has passed or the teacher is closed."""
        start, waits = time.monotonic(), retry_waits()
        while not self._stop.is_set():
            left_s = self.config.deadline_s - self._silence(start)
            try:
                reply = request(min(self.config.timeout_s, max(left_s, 0.1)))
            except NoReplyError as error:
                if self._stop.is_set():  # it is no outage: `close` ended the request
                    break
                self._missed(error, start)
                self._stop.wait(min(max(next(waits), error.wait_s), left_s))
            else:
                self._replied()
                return reply
        raise TeacherError(f"the teacher at {self.client.url} is no longer queried")

    def _silence(self, start: float) -> float:
        """Return the seconds since the last reply to any query, or since `start` if later."""
        return time.monotonic() - max(start, self._last_reply)

    def _missed(self, error: NoReplyError, start: float) -> None:
        """Report an outage, once; raise TeacherError past the deadline."""
        silence, deadline_s = self._silence(start), self.config.deadline_s
        if silence >= deadline_s:
            raise TeacherError(
                f"the teacher at {self.client.url} must reply within teacher.deadline_s = "
                f"{deadline_s:g} s, got {error}: start it again, and continue with --resume"
            )
        with self._lock:
            report = self._outage is None and silence > QUIET_S
            if report:
                self._outage = time.monotonic() - silence
        if report:
            self.say(
                f"the teacher at {self.client.url} does not reply, {error}: "
                f"waiting for it, {deadline_s:g} s at most"
            )

    def _replied(self) -> None:
        """Note the time of a reply, and report the end of an outage."""
        with self._lock:
            self._last_reply = time.monotonic()
            outage, self._outage = self._outage, None
        if outage is not None:
            silence = self._last_reply - outage
            self.say(f"the teacher at {self.client.url} is back after {silence:.0f} s")


def _wait(futures: set[Future[T]], poll: Poll | None) -> None:
    """Wait until all of them are done."""
    while futures:
        if poll is not None:
            poll()
        _, futures = wait(futures, POLL_S)


def may_query_early(method: MethodConfig, step: int, history: History) -> bool:
    """Say whether each completion of the step is distilled whatever its reward.

    The teacher can then score while the rewards are computed. Otherwise it must wait for them, so
    that a completion that is not distilled costs no request.
    """
    return (
        method.kd is not None
        and method.kd_mask == "none"
        and method.kd_coef.kind != "reward_adaptive"
        and schedule_value(method.kd_coef, step, history) > 0
    )
