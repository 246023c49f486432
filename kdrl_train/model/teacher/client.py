"""One request to a teacher behind a URL, in the two formats that it may speak.

kdrl: `python -m kdrl_train serve`. openai: what vLLM does, by its sources of 2026. POST
/v1/completions with `"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0` answers
`choices[0].prompt_logprobs`: null for the first token, then for each one a mapping from its id, as
text, to {"logprob", "rank", "decoded_token"}. These are at temperature 1 whatever is asked, over
all columns of the model's head; -inf is sent as -9999.
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

T = TypeVar("T")

TRY_AGAIN = (429, 500, 502, 503, 504)
"""Answers of a server that is full, loading or restarting."""
FORBIDDEN = -9998.0
"""vLLM writes -inf as -9999."""
ROUNDING = 1e-3
"""A log-probability above this is none: rounding explains less."""


class TeacherError(RunError, OSError):
    """The teacher's server gives no answer in time, or a wrong one: the run cannot go on."""


class NoAnswerError(Exception):
    """No answer this time: ask again, after `wait_s` seconds if the server said how many."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Query:
    """One completion to score."""

    name: str
    """What messages call it."""
    prompt_ids: list[int]
    completion_ids: list[int]
    vocab_size: int | None = None
    """Columns from here on are no part of the distribution (not for openai); None: all are."""
    temperature: float = 1.0

    def __str__(self) -> str:
        lengths = f"{len(self.completion_ids)} tokens after a prompt of {len(self.prompt_ids)}"
        return f"{self.name} ({lengths})"


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """What a server says of its teacher; None: it does not say."""

    model: str
    window: int | None
    """Most tokens of a prompt with its completion."""
    vocab_size: int | None = None
    dtype: str | None = None
    tokenizer: str | None = None
    """vocabulary_hash of its tokenizer."""
    eos_ids: list[int] | None = None
    fingerprint: str | None = None
    """Changes with any of the above; in every answer, since a server may restart as another."""


class TeacherClient(ABC):
    """A teacher's server; threads may share it.

    Args:
        url: http://host:port, with or without /v1.
        config: timeouts, and the connections that are kept open.
    Raises: TeacherError when it does not answer at once with what it is.
    """

    def __init__(self, url: str, config: TeacherConfig) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout_s = config.timeout_s
        limits = httpx2.Limits(max_connections=config.concurrency)
        try:
            self._http = httpx2.Client(base_url=self.url, limits=limits)
        except httpx2.InvalidURL as error:
            raise TeacherError(f"model.teacher must be a URL, got {url!r}: {error}") from error
        try:
            self.info = self._info(config.name)
        except TeacherError:
            self.close()
            raise
        except NoAnswerError as error:
            self.close()
            raise TeacherError(
                f"model.teacher must answer, got {error} from {self.url}: start it with `python -m "
                "kdrl_train serve`, wait until its /health says ready, or correct the URL"
            ) from error

    @property
    def vocab_size(self) -> int | None:
        """Columns of the teacher's head; None: the server does not say."""
        return self.info.vocab_size

    def close(self) -> None:
        """Drop the connections."""
        self._http.close()

    def logprobs(self, query: Query, timeout_s: float | None = None) -> Tensor:
        """[T] float32, nats: log-probability of each token of the completion.

        Raises: NoAnswerError to ask again; TeacherError for an answer that is no answer to this.
        """
        timeout_s = timeout_s or self.timeout_s
        values = self._read(str(query), lambda: [float(x) for x in self._values(query, timeout_s)])
        found = torch.tensor(values, dtype=torch.float32)
        problem = _problem(found, query.completion_ids)
        if problem is not None:
            raise TeacherError(
                f"the teacher at {self.url} must give a finite log-probability for each token of "
                f"{query}, got {problem}: see the server's log and model.teacher_api"
            )
        return found

    def _read(self, what: str, reader: Callable[[], T]) -> T:
        """reader(); TeacherError where the answer has not the format that it expects."""
        try:
            return reader()
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise TeacherError(
                f"the teacher at {self.url} must answer in the format of model.teacher_api, got "
                f"{type(error).__name__} ({error}) when reading {what}: is it the right one?"
            ) from error

    def _send(self, what: str, path: str, body: Any, timeout_s: float) -> Any:
        """JSON of one answer; GET without a body; `what` is asked for, for messages."""
        method = "GET" if body is None else "POST"
        try:
            response = self._http.request(method, path, json=body, timeout=timeout_s)
        except httpx2.TransportError as error:
            raise NoAnswerError(f"{type(error).__name__} ({error})") from error
        status, text = response.status_code, response.text[:500]
        if status in TRY_AGAIN:
            wait = response.headers.get("retry-after", "0")
            raise NoAnswerError(f"status {status} ({text})", float(wait) if wait.isdigit() else 0.0)
        if status != 200:
            raise TeacherError(
                f"the teacher at {self.url} must answer {method} {path} with {what}, got status "
                f"{status}: {text}; see model.teacher and model.teacher_api"
            )
        try:
            return response.json()
        except ValueError as error:
            raise TeacherError(
                f"the teacher at {self.url} must answer {method} {path} with {what} in JSON, got "
                f"{text!r}: see model.teacher and model.teacher_api"
            ) from error

    @abstractmethod
    def _info(self, name: str | None) -> TeacherInfo: ...

    @abstractmethod
    def _values(self, query: Query, timeout_s: float) -> list[float]: ...


class KdrlClient(TeacherClient):
    """`python -m kdrl_train serve`."""

    def _info(self, _name: str | None) -> TeacherInfo:
        version = self._send("what it is", "/version", None, self.timeout_s)
        names = TeacherInfo.__dataclass_fields__
        return self._read("/version", lambda: TeacherInfo(**{n: version[n] for n in names}))

    def _values(self, query: Query, timeout_s: float) -> list[float]:
        ids = query.prompt_ids + query.completion_ids
        body = {
            "sequences": [{"ids": ids, "prompt_tokens": len(query.prompt_ids)}],
            "temperature": query.temperature,
            "vocab_size": query.vocab_size,
        }
        answer = self._send(str(query), "/score", body, timeout_s)
        if answer["fingerprint"] != self.info.fingerprint:
            raise TeacherError(
                f"the teacher at {self.url} must stay the same during a run, got another one than "
                f"{self.info.model} ({self.info.dtype}): restart the server as it was"
            )
        (values,) = answer["logprobs"]
        return values


class OpenAiClient(TeacherClient):
    """vLLM, or another server with its prompt_logprobs."""

    def _info(self, name: str | None) -> TeacherInfo:
        answer = self._send("its models", "/v1/models", None, self.timeout_s)
        models = self._read("/v1/models", lambda: {m["id"]: m for m in answer["data"]})
        if name is None and len(models) == 1:
            (name,) = models
        if name is None or name not in models:
            raise TeacherError(
                f"teacher.name must be a model of {self.url}, got {name}: it has "
                f"{', '.join(models)}"
            )
        longest = models[name].get("max_model_len")
        # it insists on generating a token, which needs a place too
        return TeacherInfo(model=name, window=None if longest is None else longest - 1)

    def _values(self, query: Query, timeout_s: float) -> list[float]:
        return [entry["logprob"] for entry in self._entries(query, timeout_s)]

    def texts(self, query: Query) -> list[str | None]:
        """What the server decodes each token of the completion to; None where it does not say."""
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
        answer = self._send(str(query), "/v1/completions", body, timeout_s)
        (choice,) = answer["choices"]
        found = choice.get("prompt_logprobs")
        if found is None:
            raise TeacherError(
                f"the teacher at {self.url} must return prompt log-probabilities, got none for "
                f"{query}: use vLLM, or `python -m kdrl_train serve`"
            )
        start = len(query.prompt_ids)
        return [entry[str(i)] for i, entry in zip(ids[start:], found[start:], strict=True)]


def _problem(found: Tensor, ids: list[int]) -> str | None:
    """What is wrong with the log-probabilities of tokens; None: nothing."""
    if len(found) != len(ids):
        return f"{len(found)}"
    for t in (~((found > FORBIDDEN) & (found < ROUNDING))).nonzero().flatten().tolist():
        return f"{found[t]:g} for token {t} (id {ids[t]})"
    return None


def connect(model: ModelConfig, config: TeacherConfig) -> TeacherClient:
    """A client of the server at model.teacher. Raises: TeacherError unless it is ready."""
    url = str(model.teacher)
    return KdrlClient(url, config) if model.teacher_api == "kdrl" else OpenAiClient(url, config)


def vocabulary_hash(tokenizer: Any) -> str:
    """SHA-256 of the map from token to id: the same for two tokenizers with the same map."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
