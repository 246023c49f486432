"""Sends one query to a teacher behind a URL, in the format of `python -m kdrl_train serve`; another
format is in openai.py."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl_train.batch import TopkScores
from kdrl_train.config import TeacherConfig
from kdrl_train.errors import RunError
from kdrl_train.exchange import BadReplyError, Exchange, NoReplyError, member, only, typed
from kdrl_train.model.teacher.replies import (
    Shapes,
    described,
    logprob_problem,
    most_bytes,
    read_arrays,
    topk_problem,
)

TOKEN = "KDRL_TEACHER_TOKEN"
"""Environment variable with the token that a teacher's server demands, of either format."""


FIRST_REPLY_S = 10.0
"""Longest wait, before the first step, for what a server says of its model: that takes no time."""

UNKNOWN = object()
"""Stands for what a server does not say, where None means that there is none."""


class TeacherError(RunError, OSError):
    """Ends the run: the teacher's server did not reply in time, or its reply is wrong."""


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
    hidden_size: int | None = None
    """H_t, the length of a hidden state that its head reads."""
    logit_scale: float | None = None
    """What softcap(logit_scale · hidden · headᵀ) has before the cap; 1.0: nothing."""
    softcap: float | None = None
    """The cap of the logits; None: there is none, where hidden_size is known."""
    fingerprint: str | None = None
    """Changes with any of the above but the model's name. Every reply holds it, as a server may
    restart with another model."""
    root: str | None = None
    """The folder or hub id that an openai server has loaded, which has no fingerprint."""
    files: str | None = None
    """The weights_hash of the folder `root`, if it is on this machine: the server's, where both
    see the same disk."""
    probe_ids: list[list[int]] | None = None
    """A few prompts, of a teacher without a hash of its weights."""
    probe_logprobs: list[list[float]] | None = None
    """What it says of each of their tokens but the first, in nats."""


class TeacherClient(ABC):
    """Talks to a teacher's server; threads may share one client.

    Args:
        url: http://host:port, with or without /v1.
        config: gives the timeouts and the number of connections.
    Raises: TeacherError when the server does not reply at once and describe its model.
    """

    def __init__(self, url: str, config: TeacherConfig) -> None:
        try:
            self._exchange = Exchange(url, "model.teacher", TOKEN)
        except ValueError as error:
            raise TeacherError(str(error)) from error
        self.url = self._exchange.url
        self.timeout_s = config.timeout_s
        self.chat_template: Any = UNKNOWN
        """That of the model's tokenizer, None if it has none; UNKNOWN: the server does not say."""
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
        """Stop the requests that are open, and close the connections. May be called twice."""
        self._exchange.close()

    def logprobs(self, query: Query, timeout_s: float | None = None) -> Tensor:
        """Return the log-probability of each token of the completion, [T] float32, nats.

        Raises: NoReplyError where a new try may help; TeacherError for a reply that does not fit.
        """
        values = self._values(query, timeout_s or self.timeout_s)
        problem = logprob_problem(values, query.completion_ids)
        if problem is not None:
            raise TeacherError(
                f"the teacher at {self.url} must give a finite log-probability for each token of "
                f"{query}, got {problem}: see the server's log and model.teacher_api"
            )
        return torch.tensor(values, dtype=torch.float32)

    def _changed(self, was: str, now: str = "") -> TeacherError:
        return TeacherError(
            f"the teacher at {self.url} must stay the same during a run, got another one than "
            f"{was}{now and f', {now}'}: restart the server as it was"
        )

    def _wrong(self, what: str, error: BadReplyError) -> TeacherError:
        """Make the error for a reply that has not the format of model.teacher_api."""
        return TeacherError(
            f"the teacher at {self.url} must reply in the format of model.teacher_api, got "
            f"{error} when reading {what}: set model.teacher_api to the format of this server"
        )

    def _send(self, what: str, path: str, body: Any, timeout_s: float, tokens: int = 0) -> Any:
        """Return the JSON of one reply; without a body the request is a GET.

        Args:
            what: names in messages what the request is for.
            tokens: how many the reply is about.
        """
        method = "GET" if body is None else "POST"
        with self._named(what, f"{method} {path}", " in JSON"):
            work = self._exchange.json(method, path, body, timeout_s, tokens)
            return self._exchange.start(work).result()

    @contextmanager
    def _named(self, what: str, request: str, form: str) -> Iterator[None]:
        """Say in an error what was requested, and in which form it must come."""
        try:
            yield
        except CancelledError as error:
            raise NoReplyError("an end of the client") from error
        except BadReplyError as error:
            raise TeacherError(
                f"the teacher at {self.url} must reply to {request} with {what}"
                f"{form if error.status is None else ''}, got {error}; see model.teacher and "
                "model.teacher_api"
            ) from error

    @abstractmethod
    def require_same(self, timeout_s: float) -> None:
        """Raise TeacherError where the server has another model than at first, unless its replies
        say so; NoReplyError where a new try may help."""

    @abstractmethod
    def _info(self, name: str | None) -> TeacherInfo: ...

    @abstractmethod
    def _values(self, query: Query, timeout_s: float) -> list[Any]: ...


class KdrlClient(TeacherClient):
    """Talks to `python -m kdrl_train serve`."""

    def _info(self, _name: str | None) -> TeacherInfo:
        version = self._send("what it is", "/version", None, min(self.timeout_s, FIRST_REPLY_S))
        try:
            info = TeacherInfo(**described(version))
        except BadReplyError as error:
            raise self._wrong("/version", error) from error
        self.chat_template = version.get("chat_template", UNKNOWN)
        return info

    def require_same(self, _timeout_s: float) -> None:
        """Do nothing: every reply holds the fingerprint."""

    def states(self, query: Query, timeout_s: float | None = None) -> Tensor:
        """Return what the teacher's head reads to predict each token of the completion: [T, H_t],
        in the dtype that the server computes in.

        Raises: as logprobs.
        """
        if self.info.hidden_size is None:
            raise self._too_old("hidden states")
        dtype = getattr(torch, str(self.info.dtype))
        shapes: Shapes = {"states": (dtype, (len(query.completion_ids), self.info.hidden_size))}
        body = {"sequences": _sequences(query), "vocab_size": query.sampled_vocab_size}
        states = self._arrays(query, "/hidden", body, shapes, timeout_s)["states"]
        if not states.isfinite().all():
            raise self._bad_numbers(query, "finite states", "others")
        return states

    def topk(self, query: Query, count: int, timeout_s: float | None = None) -> TopkScores:
        """Return the `count` likeliest tokens at each place of the completion.

        Raises: as logprobs.
        """
        T = len(query.completion_ids)
        if self.info.hidden_size is None:
            raise self._too_old("its likeliest tokens")
        shapes: Shapes = {
            "logprobs": (torch.float32, (T,)),
            "topk_ids": (torch.int32, (T, count)),
            "topk_logprobs": (torch.float32, (T, count)),
        }
        body = _score_body(query) | {"topk": count}
        arrays = self._arrays(query, "/score", body, shapes, timeout_s)
        sampled, ids = arrays["logprobs"], arrays["topk_ids"].long()
        topk = TopkScores(sampled, ids, arrays["topk_logprobs"])
        columns = query.sampled_vocab_size or self.info.vocab_size
        assert columns is not None
        problem = topk_problem(topk, columns)
        problem = problem or logprob_problem(sampled.tolist(), query.completion_ids)
        if problem is not None:
            raise self._bad_numbers(query, f"{count} likeliest tokens at each place", problem)
        return topk

    def _values(self, query: Query, timeout_s: float) -> list[Any]:
        tokens = len(query.completion_ids)
        reply = self._send(str(query), "/score", _score_body(query), timeout_s, tokens)
        try:
            fingerprint = member(reply, "fingerprint", str)
            values: list[Any] = typed(only(reply, "logprobs"), "logprobs", list)
        except BadReplyError as error:
            raise self._wrong(str(query), error) from error
        self._check_fingerprint(fingerprint)
        return values

    def _arrays(
        self, query: Query, path: str, body: Any, shapes: Shapes, timeout_s: float | None
    ) -> dict[str, Tensor]:
        """Return the arrays of one reply, which have these dtypes and shapes."""
        with self._named(str(query), f"POST {path}", " in the format of safetensors"):
            work = self._exchange.data(
                "POST", path, body, timeout_s or self.timeout_s, most_bytes(shapes)
            )
            arrays, fingerprint = read_arrays(self._exchange.start(work).result(), shapes)
        self._check_fingerprint(fingerprint)
        return arrays

    def _too_old(self, what: str) -> TeacherError:
        return TeacherError(
            f"the teacher at {self.url} must give {what}, got a server of an older version: serve "
            "it with `python -m kdrl_train serve` of this one"
        )

    def _bad_numbers(self, query: Query, what: str, problem: str) -> TeacherError:
        return TeacherError(
            f"the teacher at {self.url} must give {what} for {query}, got {problem}: see the "
            "server's log"
        )

    def _check_fingerprint(self, fingerprint: str) -> None:
        """Raise TeacherError where the server has another model than at first."""
        if fingerprint != self.info.fingerprint:
            raise self._changed(f"{self.info.model} ({self.info.dtype})")


def _sequences(query: Query) -> list[dict[str, Any]]:
    """Write the only sequence of a request to our server."""
    ids = query.prompt_ids + query.completion_ids
    return [{"ids": ids, "prompt_tokens": len(query.prompt_ids)}]


def _score_body(query: Query) -> dict[str, Any]:
    """Write the body of POST /score."""
    return {
        "sequences": _sequences(query),
        "temperature": query.temperature,
        "vocab_size": query.sampled_vocab_size,
    }


def differing_token(policy: Any, teacher: Any) -> tuple[int, str | None, str | None] | None:
    """Find the token with the lowest id that differs between two tokenizers.

    Returns: its id, the policy's and the teacher's token; None where both maps are the same.
    """
    policy_tokens = {i: token for token, i in policy.get_vocab().items()}
    teacher_tokens = {i: token for token, i in teacher.get_vocab().items()}
    for i in sorted(policy_tokens.keys() | teacher_tokens.keys()):
        if policy_tokens.get(i) != teacher_tokens.get(i):
            return i, policy_tokens.get(i), teacher_tokens.get(i)
    return None


def vocabulary_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's map from token to id; equal maps have equal hashes."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
