"""Talks to a vLLM server over HTTP, as vLLM 0.32 speaks it in development mode.

Every failure is an EngineError.
"""

import asyncio
from collections.abc import Callable
from itertools import islice
from typing import Any

import httpx2

from kdrl_train.errors import EngineError
from kdrl_train.proxies import is_loopback, proxy_note
from kdrl_train.rollouts.engines.requests import CompletionReply, CompletionRequest
from kdrl_train.waiting import POLL_S, Poll, retry_waits

RETRIES = 4
"""New tries where a connection broke, as an idle one may; they wait up to 3.75 s in all."""


class VllmClient:
    """Sends requests to one server.

    Args:
        url: http://host:port, with or without /v1.
        timeout_s: longest wait for one reply, in seconds.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout_s = timeout_s
        self.trust_env = not is_loopback(self.url)

    def workers(self, method: str, *arguments: str) -> list[Any]:
        """Call a method of rollouts/vllm_worker.py on each worker, and return their results."""
        path = "/collective_rpc"
        reply = self.send("POST", path, {"method": method, "args": arguments})
        if not (isinstance(reply, dict) and isinstance(reply.get("results"), list)):
            raise self._nonsense(path, str(reply))
        results: list[Any] = reply["results"]
        return results

    def send(self, verb: str, path: str, body: Any = None) -> Any:
        """Return the JSON of one reply."""
        try:
            response = httpx2.request(
                verb,
                self.url + path,
                json=body,
                timeout=self.timeout_s,
                trust_env=self.trust_env,
            )
        # ValueError, ImportError: a proxy of the environment that httpx2 cannot use
        except (httpx2.TransportError, httpx2.InvalidURL, ValueError, ImportError) as error:
            raise self._silence(path, error) from error
        return self._json(response, path)

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
        return asyncio.run(self._complete_all(model, requests, concurrency, poll, report))

    async def _complete_all(
        self,
        model: str,
        requests: list[CompletionRequest],
        concurrency: int,
        poll: Poll,
        report: Callable[[int, int], None] | None,
    ) -> list[CompletionReply]:
        limits = httpx2.Limits(max_connections=concurrency)
        timeout = httpx2.Timeout(self.timeout_s, pool=None)
        async with httpx2.AsyncClient(
            base_url=self.url, limits=limits, timeout=timeout, trust_env=self.trust_env
        ) as http:
            tasks = [asyncio.create_task(self._complete(http, model, r)) for r in requests]
            pending, tokens = set(tasks), 0
            try:
                while pending:
                    poll()
                    done, pending = await asyncio.wait(pending, timeout=POLL_S)
                    tokens += sum(len(task.result().ids or ()) for task in done)
                    if report is not None:
                        report(len(tasks) - len(pending), tokens)
            finally:
                for task in tasks:
                    task.cancel()  # the server drops a request that nobody waits for
                await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() for task in tasks]

    async def _complete(
        self, http: httpx2.AsyncClient, model: str, request: CompletionRequest
    ) -> CompletionReply:
        path = "/v1/completions"
        body = {"model": model, "prompt": request.prompt_ids, "return_token_ids": True}
        for wait_s in (*islice(retry_waits(), RETRIES), None):
            try:
                response = await http.post(path, json=body | request.params)
                break
            except httpx2.TransportError as error:
                if wait_s is None or isinstance(error, httpx2.TimeoutException):
                    raise self._silence(path, error) from error
            await asyncio.sleep(wait_s)
        reply = self._json(response, path)
        try:
            (choice,) = reply["choices"]
            return CompletionReply(choice["token_ids"], choice["logprobs"]["token_logprobs"])
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(
                f"the server at {self.url} must return token_ids and log-probabilities, got "
                f"{str(reply)[:500]}: use vLLM 0.32 or newer"
            ) from error

    def _json(self, response: httpx2.Response, path: str) -> Any:
        if response.status_code != 200:
            raise EngineError(
                f"the server at {self.url} must reply to {path}, got status "
                f"{response.status_code}: {response.text[:500]}{proxy_note(self.url)}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise self._nonsense(path, response.text) from error

    def _nonsense(self, path: str, reply: str) -> EngineError:
        return EngineError(
            f"the server at {self.url} must reply to {path} as vLLM 0.32 does, got "
            f"{reply[:500]!r}{proxy_note(self.url)}: set engine.url to a vLLM server"
        )

    def _silence(self, path: str, error: Exception) -> EngineError:
        return EngineError(
            f"the server at {self.url} must reply to {path} within engine.timeout_s = "
            f"{self.timeout_s:g} s, got {type(error).__name__} ({error}){proxy_note(self.url)}: "
            "start it again, and continue with --resume"
        )
