"""Talks to a vLLM server over HTTP, as vLLM 0.32 speaks it in development mode.

Every failure is an EngineError.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from typing import Any, TypeVar

from kdrl_train.errors import EngineError
from kdrl_train.exchange import BadReplyError, Exchange, NoReplyError, member, only, typed
from kdrl_train.rollouts.engines.requests import CompletionReply, CompletionRequest
from kdrl_train.waiting import POLL_S, Poll, retry_waits

T = TypeVar("T")

TOKEN = "VLLM_API_KEY"
"""Environment variable with the key that the server demands, as vLLM itself names it."""
COMPLETIONS = "/v1/completions"
QUIET_S = 1.0
"""A shorter time without a reply, in seconds, is not reported."""


def _say_nothing(_message: str) -> None:
    """Stands for the log of a run that has not begun."""


class VllmClient:
    """Sends requests to one server.

    Args:
        url: http://host:port, with or without /v1.
        timeout_s: longest wait for one reply, and for a server that is away, in seconds.
    Raises: EngineError for a URL, a proxy of the environment or a token that cannot be used.
    """

    say: Callable[[str], None] = staticmethod(_say_nothing)
    """Reports outages; it is called from any thread."""

    def __init__(self, url: str, timeout_s: float) -> None:
        try:
            self._exchange = Exchange(url, "engine.url", TOKEN)
        except ValueError as error:
            raise EngineError(str(error)) from error
        self.url = self._exchange.url
        self.timeout_s = timeout_s
        self._outage: float | None = None
        self._said = False

    def close(self) -> None:
        """Stop the requests that are open, and close the connections. May be called twice."""
        self._exchange.close()

    def workers(
        self, method: str, *arguments: str, poll: Poll | None = None, patient: bool = False
    ) -> list[Any]:
        """Call a method of rollouts/vllm_worker.py on each worker, and return their results."""
        path = "/collective_rpc"
        body = {"method": method, "args": arguments}
        reply = self.send("POST", path, body, poll=poll, patient=patient)
        try:
            results: list[Any] = member(reply, "results", list)
            if not results:
                raise BadReplyError("results of no worker")
        except BadReplyError as error:
            raise self.wrong(path, error) from error
        return results

    def send(
        self,
        verb: str,
        path: str,
        body: Any = None,
        *,
        poll: Poll | None = None,
        patient: bool = False,
    ) -> Any:
        """Return the JSON of one reply.

        Args:
            poll: called regularly; an exception it raises stops the request.
            patient: whether to try again where the server is away, for timeout_s at most.
        """
        (reply,) = self._run([self._reply(verb, path, body, patient=patient)], poll, None)
        return reply

    def complete(
        self,
        model: str,
        requests: list[CompletionRequest],
        concurrency: int,
        poll: Poll,
        report: Callable[[int, int], None] | None = None,
    ) -> list[CompletionReply]:
        """Return a reply for each request, in their order.

        Args:
            model: the name that the server has for its model.
            concurrency: largest number of requests that wait for a reply at a time.
            poll: called regularly; an exception it raises stops sampling, on the server too.
            report: called with the replies and the tokens that have come.
        """
        places = asyncio.Semaphore(concurrency)
        return self._run([self._complete(places, model, r) for r in requests], poll, report)

    def _run(
        self,
        work: list[Coroutine[Any, Any, T]],
        poll: Poll | None,
        report: Callable[[int, int], None] | None,
    ) -> list[T]:
        """Return what the coroutines return; an exception of one, or of poll, stops the others."""
        futures: list[Future[T]] = []
        try:
            futures += [self._exchange.start(one) for one in work]
            pending, tokens = set(futures), 0
            while pending:
                if poll is not None:
                    poll()
                done, pending = wait(pending, POLL_S)
                replies = [future.result() for future in done]
                if report is not None:
                    tokens += sum(len(r.ids) for r in replies if isinstance(r, CompletionReply))
                    report(len(futures) - len(pending), tokens)
        except CancelledError as error:
            raise EngineError(f"the server at {self.url} is no longer used") from error
        finally:
            for future in futures:
                future.cancel()  # the server drops a request that nobody waits for
        return [future.result() for future in futures]

    async def _complete(
        self, places: asyncio.Semaphore, model: str, request: CompletionRequest
    ) -> CompletionReply:
        body = {"model": model, "prompt": request.prompt_ids, "return_token_ids": True}
        body |= request.params
        tokens = len(request.prompt_ids) + request.params.get("max_tokens", 0)
        async with places:
            reply = await self._reply("POST", COMPLETIONS, body, tokens, patient=True)
        try:
            return _completion(reply, request.prompt_ids)
        except BadReplyError as error:
            raise EngineError(
                f"the server at {self.url} must return token_ids and log-probabilities, got "
                f"{error}: use vLLM 0.32 or newer"
            ) from error

    async def _reply(
        self, verb: str, path: str, body: Any, tokens: int = 0, *, patient: bool
    ) -> Any:
        """Return the JSON of a reply of the server, as `send` says; tokens: as Exchange.json."""
        until, waits = None, retry_waits()
        while True:
            left_s = self.timeout_s if until is None else max(until - time.monotonic(), 0.1)
            try:
                reply = await self._exchange.json(verb, path, body, left_s, tokens)
            except BadReplyError as error:
                raise self.wrong(path, error) from error
            except NoReplyError as error:
                if error.status == 500 and path != COMPLETIONS:  # a worker's error stays one
                    problem = BadReplyError(f"{error}: see its log", error.status)
                    raise self.wrong(path, problem) from error
                until = until or time.monotonic() + self.timeout_s
                left_s = until - time.monotonic()
                if error.late or not patient or left_s <= 0:
                    raise self._silence(path, error) from error
                self._missed(error)
                await asyncio.sleep(min(max(next(waits), error.wait_s), left_s))
            else:
                self._replied()
                return reply

    def _missed(self, error: NoReplyError) -> None:
        """Report an outage, once; runs in the thread of the exchange, as _replied."""
        now = time.monotonic()
        self._outage = self._outage or now
        if not self._said and now - self._outage > QUIET_S:
            self._said = True
            self.say(
                f"the server at {self.url} does not reply, {error}: waiting for it, "
                f"{self.timeout_s:g} s at most"
            )

    def _replied(self) -> None:
        """Report the end of an outage."""
        if self._said and self._outage is not None:
            silence = time.monotonic() - self._outage
            self.say(f"the server at {self.url} is back after {silence:.0f} s")
        self._outage, self._said = None, False

    def wrong(self, path: str, error: BadReplyError) -> EngineError:
        """Make the error for a reply that is not vLLM's."""
        if error.status is not None:
            return EngineError(f"the server at {self.url} must reply to {path}, got {error}")
        return EngineError(
            f"the server at {self.url} must reply to {path} as vLLM 0.32 does, got {error}: set "
            "engine.url to a vLLM server"
        )

    def _silence(self, path: str, error: NoReplyError) -> EngineError:
        return EngineError(
            f"the server at {self.url} must reply to {path} within engine.timeout_s = "
            f"{self.timeout_s:g} s, got {error}: see its log, start it again, and continue with "
            "--resume"
        )


def _completion(reply: Any, prompt_ids: list[int]) -> CompletionReply:
    """Read the reply to a request; its values are checked by RequestEngine.

    Raises: BadReplyError.
    """
    choice = only(reply, "choices")
    ids = member(choice, "token_ids", list)
    logprobs = member(member(choice, "logprobs", dict), "token_logprobs", list)
    of_prompt = typed(choice.get("prompt_token_ids"), "prompt_token_ids", list, type(None))
    if of_prompt is not None and of_prompt != prompt_ids:
        raise BadReplyError("a completion of another prompt")
    return CompletionReply(ids, logprobs)
