"""Sends one query to a teacher behind a URL, in one of the two formats that it may speak.

kdrl is the format of `python -m kdrl_train serve`. openai is what vLLM does, by its sources of
2026: the reply to POST /v1/completions with `"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0`
holds `choices[0].prompt_logprobs`, which is null for the first token, and for each other one a
mapping from its id, as text, to {"logprob", "rank", "decoded_token"}. These log-probabilities are
at temperature 1, whatever the request says, over all columns of the model's head; -inf is sent as
-9999.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
import torch
from torch import Tensor

from kdrl_train.config import ModelConfig, TeacherConfig
from kdrl_train.errors import RunError
from kdrl_train.proxies import is_loopback, proxy_note

T = TypeVar("T")

TRY_AGAIN = (429, 500, 502, 503, 504)
"""Status codes of a server that is full, loading or restarting."""
FORBIDDEN = -9998.0
"""A log-probability below this stands for -inf, which vLLM writes as -9999."""
ROUNDING = 1e-3
"""A log-probability above this is wrong: rounding alone stays below it."""


UNKNOWN = object()
"""Stands for what a server does not say, where None means that there is none."""


class TeacherError(RunError, OSError):
    """Ends the run: the teacher's server did not reply in time, or its reply is wrong."""


class NoReplyError(Exception):
    """Says that the server did not reply, so that a new try may help.

    wait_s: seconds that the server told us to wait.
    """

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Query:
    """Describes one completion to score."""

    name: str
    """Names the completion in messages."""
    prompt_ids: list[int]
    completion_ids: list[int]
    sampled_vocab_size: int | None = None
    """Columns from here on are left out of the distribution (not by openai); None: none is."""
    temperature: float = 1.0

    def __str__(self) -> str:
        lengths = f"{len(self.completion_ids)} tokens after a prompt of {len(self.prompt_ids)}"
        return f"{self.name} ({lengths})"


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """Describes the model of a server; None stands for what the server does not say."""

    model: str
    window: int | None
    """Largest number of tokens of a prompt with its completion."""
    vocab_size: int | None = None
    dtype: str | None = None
    tokenizer: str | None = None
    """The vocabulary_hash of the model's tokenizer."""
    eos_ids: list[int] | None = None
    weights: str | None = None
    """The weights_hash of the model's files."""
    fingerprint: str | None = None
    """Changes with any of the above but the model's name. Every reply holds it, as a server may
    restart with another model."""


class TeacherClient(ABC):
    """Talks to a teacher's server; threads may share one client.

    Args:
        url: http://host:port, with or without /v1.
        config: gives the timeouts and the number of connections.
    Raises: TeacherError when the server does not reply at once and describe its model.
    """

    def __init__(self, url: str, config: TeacherConfig) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout_s = config.timeout_s
        self.chat_template: Any = UNKNOWN
        """That of the model's tokenizer, None if it has none; UNKNOWN: the server does not say."""
        connections = httpx2.Limits(max_connections=config.concurrency)
        trust = not is_loopback(self.url)
        try:
            self._http = httpx2.Client(base_url=self.url, limits=connections, trust_env=trust)
        except (httpx2.InvalidURL, ValueError, ImportError) as error:  # the latter two: a proxy
            note = proxy_note(self.url)
            raise TeacherError(
                f"model.teacher must be a URL, got {url!r}{note}: {error}"
            ) from error
        try:
            self.info = self._info(config.name)
        except TeacherError:
            self.close()
            raise
        except NoReplyError as error:
            self.close()
            raise TeacherError(
                f"model.teacher must reply, got {error} from {self.url}: start it with `python -m "
                "kdrl_train serve`, wait until its /health says ready, or correct the URL"
            ) from error

    @property
    def vocab_size(self) -> int | None:
        """Number of columns of the teacher's head; None: the server does not say."""
        return self.info.vocab_size

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def logprobs(self, query: Query, timeout_s: float | None = None) -> Tensor:
        """Return the log-probability of each token of the completion, [T] float32, nats.

        Raises: NoReplyError where a new try may help; TeacherError for a reply that does not fit.
        """
        timeout_s = timeout_s or self.timeout_s
        values = self._read(str(query), lambda: [float(x) for x in self._values(query, timeout_s)])
        logprobs = torch.tensor(values, dtype=torch.float32)
        problem = _problem(logprobs, query.completion_ids)
        if problem is not None:
            raise TeacherError(
                f"the teacher at {self.url} must give a finite log-probability for each token of "
                f"{query}, got {problem}: see the server's log and model.teacher_api"
            )
        return logprobs

    def _read(self, what: str, reader: Callable[[], T]) -> T:
        """Return reader(); raise TeacherError where a reply has not the format it expects."""
        try:
            return reader()
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise TeacherError(
                f"the teacher at {self.url} must reply in the format of model.teacher_api, got "
                f"{type(error).__name__} ({error}) when reading {what}: set model.teacher_api "
                "to the format of this server"
            ) from error

    def _send(self, what: str, path: str, body: Any, timeout_s: float) -> Any:
        """Return the JSON of one reply; without a body the request is a GET.

        what: names in messages what the request is for.
        """
        method = "GET" if body is None else "POST"
        try:
            response = self._http.request(method, path, json=body, timeout=timeout_s)
        except httpx2.TransportError as error:
            raise NoReplyError(f"{type(error).__name__} ({error}){proxy_note(self.url)}") from error
        status, text = response.status_code, response.text[:500]
        if status in TRY_AGAIN:
            wait = response.headers.get("retry-after", "0")
            message = f"status {status} ({text}){proxy_note(self.url)}"
            raise NoReplyError(message, float(wait) if wait.isdigit() else 0.0)
        if status != 200:
            raise TeacherError(
                f"the teacher at {self.url} must reply to {method} {path} with {what}, got status "
                f"{status}: {text}{proxy_note(self.url)}; see model.teacher and model.teacher_api"
            )
        try:
            return response.json()
        except ValueError as error:
            raise TeacherError(
                f"the teacher at {self.url} must reply to {method} {path} with {what} in JSON, "
                f"got {text!r}{proxy_note(self.url)}: see model.teacher and model.teacher_api"
            ) from error

    @abstractmethod
    def _info(self, name: str | None) -> TeacherInfo: ...

    @abstractmethod
    def _values(self, query: Query, timeout_s: float) -> list[float]: ...


class KdrlClient(TeacherClient):
    """Talks to `python -m kdrl_train serve`."""

    def _info(self, _name: str | None) -> TeacherInfo:
        version = self._send("what it is", "/version", None, self.timeout_s)
        self.chat_template = version.get("chat_template", UNKNOWN)
        version = {"weights": None} | version  # servers before 0.1 have no hash of them
        names = TeacherInfo.__dataclass_fields__
        return self._read("/version", lambda: TeacherInfo(**{n: version[n] for n in names}))

    def _values(self, query: Query, timeout_s: float) -> list[float]:
        ids = query.prompt_ids + query.completion_ids
        body = {
            "sequences": [{"ids": ids, "prompt_tokens": len(query.prompt_ids)}],
            "temperature": query.temperature,
            "vocab_size": query.sampled_vocab_size,
        }
        reply = self._send(str(query), "/score", body, timeout_s)
        if reply["fingerprint"] != self.info.fingerprint:
            raise TeacherError(
                f"the teacher at {self.url} must stay the same during a run, got another one than "
                f"{self.info.model} ({self.info.dtype}): restart the server as it was"
            )
        (values,) = reply["logprobs"]
        return values


class OpenAiClient(TeacherClient):
    """Talks to vLLM, or to another server that returns prompt_logprobs as vLLM does."""

    def _info(self, name: str | None) -> TeacherInfo:
        reply = self._send("its models", "/v1/models", None, self.timeout_s)
        models = self._read("/v1/models", lambda: {m["id"]: m for m in reply["data"]})
        if name is None and len(models) == 1:
            (name,) = models
        if name is None or name not in models:
            raise TeacherError(
                f"teacher.name must be a model of {self.url}, got {name}: it has "
                f"{', '.join(models)}"
            )
        longest = models[name].get("max_model_len")
        # the server generates one token for each query, which needs a place in the window too
        return TeacherInfo(model=name, window=None if longest is None else longest - 1)

    def _values(self, query: Query, timeout_s: float) -> list[float]:
        return [entry["logprob"] for entry in self._entries(query, timeout_s)]

    def texts(self, query: Query) -> list[str | None]:
        """Return the text of each token of the completion; None where the server does not say."""
        entries = self._read(str(query), lambda: self._entries(query, self.timeout_s))
        return [entry.get("decoded_token") for entry in entries]

    def _entries(self, query: Query, timeout_s: float) -> list[dict[str, Any]]:
        ids = query.prompt_ids + query.completion_ids
        body = {
            "model": self.info.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": query.temperature,
            "prompt_logprobs": 0,  # of the tokens themselves, and of no other
        }
        reply = self._send(str(query), "/v1/completions", body, timeout_s)
        (choice,) = reply["choices"]
        entries = choice.get("prompt_logprobs")
        if entries is None:
            raise TeacherError(
                f"the teacher at {self.url} must return prompt log-probabilities, got none for "
                f"{query}: use vLLM, or `python -m kdrl_train serve`"
            )
        start = len(query.prompt_ids)
        return [entry[str(i)] for i, entry in zip(ids[start:], entries[start:], strict=True)]


def _problem(logprobs: Tensor, ids: list[int]) -> str | None:
    """Say what is wrong with the log-probabilities of tokens; None: nothing is."""
    if len(logprobs) != len(ids):
        return f"{len(logprobs)} for {len(ids)} tokens"
    for t in (~((logprobs > FORBIDDEN) & (logprobs < ROUNDING))).nonzero().flatten().tolist():
        return f"{logprobs[t]:g} for token {t} (id {ids[t]})"
    return None


def connect(model: ModelConfig, config: TeacherConfig) -> TeacherClient:
    """Make a client of the server at model.teacher. Raises: TeacherError unless it is ready."""
    url = str(model.teacher)
    return KdrlClient(url, config) if model.teacher_api == "kdrl" else OpenAiClient(url, config)


def vocabulary_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's map from token to id; equal maps have equal hashes."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
