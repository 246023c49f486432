"""Talks to a teacher that vLLM serves, in the formats of its sources of 2026.

Log-probabilities: the reply to POST /v1/completions with `"prompt": ids, "max_tokens": 1,
"prompt_logprobs": 0` holds `choices[0].prompt_logprobs`, which is null for the first token, and for
each other one a mapping from its id, as text, to {"logprob", "rank", "decoded_token"}. They are at
temperature 1, whatever the request says, over all columns of the model's head; -inf is sent as
-9999.

Hidden states: the reply to POST /pooling with `"task": "token_embed"` holds the numbers of the
state of each token and nothing else, with `"encoding_format": "bytes"`; scaled to length 1 unless
`"use_activation": false`.
"""

import sys
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdrl_train.config import ModelConfig, TeacherConfig
from kdrl_train.exchange import REPLY_BYTES, BadReplyError, NoReplyError, member, only, typed
from kdrl_train.model.teacher.client import (
    FIRST_REPLY_S,
    KdrlClient,
    Query,
    TeacherClient,
    TeacherError,
    TeacherInfo,
)
from kdrl_train.model.teacher.replies import integer, of_completion, read_states

START = """--runner pooling --convert embed --pooler-config '{"task": "token_embed"}'"""
"""The options of vLLM with which it gives hidden states."""
CONNECTIONS = 16
"""How many tokens' texts are requested at the same time."""


class OpenAiClient(TeacherClient):
    """Talks to vLLM, or to another server that returns prompt_logprobs as vLLM does.

    Such a server has no fingerprint of its weights. What it says of its model is compared after the
    replies of each step, and the name in each reply with that in the first one.
    """

    beside = -1
    """What its window leaves a prompt with its completion beside max_model_len: the server
    generates one token for each query."""
    named: str | None = None
    """The name of the model in the first reply."""

    def _info(self, name: str | None) -> TeacherInfo:
        return self._described(self._model(name, self.timeout_s))

    def _described(self, model: dict[str, Any]) -> TeacherInfo:
        longest = model.get("max_model_len")
        window = None if longest is None else longest + self.beside
        return TeacherInfo(model=model["id"], window=window, root=model.get("root"))

    def require_same(self, timeout_s: float) -> None:
        """Raise TeacherError where the name, the folder or the window is another one than at first;
        NoReplyError where a new try may help."""
        now = self._described(self._model(self.info.model, timeout_s))
        if (now.root, now.window) != (self.info.root, self.info.window):
            raise self._changed(_loaded(self.info), _loaded(now))

    def _model(self, name: str | None, timeout_s: float) -> dict[str, Any]:
        """Return what the server says of the model with this name; None: of its only one."""
        reply = self._send("its models", "/v1/models", None, min(timeout_s, FIRST_REPLY_S))
        try:
            models = {member(m, "id", str): m for m in member(reply, "data", list)}
            for model in models.values():
                if model.get("max_model_len") is not None:
                    integer(model["max_model_len"], "max_model_len", 1)
                typed(model.get("root"), "root", str, type(None))
        except BadReplyError as error:
            raise self._wrong("/v1/models", error) from error
        if name is None and len(models) == 1:
            (name,) = models
        if name is None or name not in models:
            raise TeacherError(
                f"teacher.name must be a model of {self.url}, got {name}: it has "
                f"{', '.join(models)[:500]}"
            )
        return models[name]

    def _values(self, query: Query, timeout_s: float) -> list[Any]:
        return [entry.get("logprob") for entry in self._entries(query, timeout_s)]

    def texts(self, query: Query) -> list[str | None]:
        """Return the text of each token of the completion; None where the server does not say."""
        entries = self._entries(query, self.timeout_s)
        try:
            none = type(None)
            return [typed(e.get("decoded_token"), "decoded_token", str, none) for e in entries]
        except BadReplyError as error:
            raise self._wrong(str(query), error) from error

    def _entries(self, query: Query, timeout_s: float) -> list[dict[str, Any]]:
        ids = query.prompt_ids + query.completion_ids
        body = {
            "model": self.info.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": query.temperature,
            "prompt_logprobs": 0,  # of the tokens themselves, and of no other
        }
        reply = self._send(str(query), "/v1/completions", body, timeout_s, len(ids))
        try:
            choice = typed(only(reply, "choices"), "choice", dict)
            said = typed(reply.get("model"), "model", str, type(None))
            entries = choice.get("prompt_logprobs")
            self.named = self.named or said
            if said is not None and said != self.named:
                raise self._changed(str(self.named), said)
            if entries is not None:
                return of_completion(entries, ids, len(query.prompt_ids))
        except BadReplyError as error:
            raise self._wrong(str(query), error) from error
        raise TeacherError(
            f"the teacher at {self.url} must return prompt log-probabilities, got none for "
            f"{query}: use vLLM, or `python -m kdrl_train serve`"
        )


class PoolingClient(OpenAiClient):
    """Talks to a vLLM that runs the teacher without its LM head, and gives the states it reads.

    dtype: that in which the states are sent.
    """

    beside = 1  # the last token is not sent

    def __init__(self, url: str, config: TeacherConfig, dtype: torch.dtype) -> None:
        self.dtype = dtype
        super().__init__(url, config)

    def _info(self, name: str | None) -> TeacherInfo:
        info = super()._info(name)
        data = self._pooled("one token", info.model, [0], self.timeout_s, REPLY_BYTES)
        return replace(info, hidden_size=len(data) // self.dtype.itemsize)

    def states(self, query: Query, timeout_s: float | None = None) -> Tensor:
        """Return what the teacher's head reads to predict each token of the completion: [T, H_t],
        in the dtype of the client.

        Raises: as logprobs.
        """
        assert self.info.hidden_size is not None
        ids = (query.prompt_ids + query.completion_ids)[:-1]
        shape = (len(ids), self.info.hidden_size)
        most = REPLY_BYTES + len(ids) * self.info.hidden_size * self.dtype.itemsize
        data = self._pooled(str(query), self.info.model, ids, timeout_s or self.timeout_s, most)
        try:
            states = read_states(data, self.dtype, shape)
        except BadReplyError as error:
            raise TeacherError(
                f"the teacher at {self.url} must give the states that its head reads for {query}, "
                f"got {error}: see the server's log and version"
            ) from error
        return states[len(query.prompt_ids) - 1 :].clone()  # those of the prompt are not kept

    def texts(self, query: Query) -> list[str | None]:
        """Return the text of each token of the completion."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(self._text, query.completion_ids))

    def _text(self, token: int) -> str:
        body = {"model": self.info.model, "tokens": [token]}
        reply = self._send("the text of a token", "/detokenize", body, self.timeout_s)
        try:
            text: str = member(reply, "prompt", str)
        except BadReplyError as error:
            raise self._wrong("/detokenize", error) from error
        return text

    def _pooled(self, what: str, model: str, ids: list[int], timeout_s: float, most: int) -> bytes:
        """Return the bytes of the states of tokens.

        Args:
            what: names in messages what the request is for.
            most: bytes of the longest reply that is read.
        """
        body = {
            "model": model,
            "input": ids,
            "task": "token_embed",
            "use_activation": False,  # else they are scaled to length 1
            "encoding_format": "bytes",
            "embed_dtype": str(self.dtype).removeprefix("torch."),
            "endianness": sys.byteorder,
        }
        try:
            work = self._exchange.data("POST", "/pooling", body, timeout_s, most)
            return self._exchange.start(work).result()
        except CancelledError as error:
            raise NoReplyError("an end of the client") from error
        except BadReplyError as error:
            raise TeacherError(
                f"the teacher at {self.url} must give hidden states for {what}, got {error}: start "
                f"vLLM with {START}, or see the server's log"
            ) from error


def _loaded(info: TeacherInfo) -> str:
    """Say what an openai server has loaded."""
    return f"{info.model} from {info.root} with a window of {info.window} tokens"


def connect(
    model: ModelConfig, config: TeacherConfig, url: str | None = None, *, states: bool = False
) -> TeacherClient:
    """Make a client of the server at a URL.

    Args:
        url: None: model.teacher.
        states: whether it must give hidden states.
    Raises: TeacherError unless it is ready.
    """
    url = url or str(model.teacher)
    if model.teacher_api == "kdrl":
        return KdrlClient(url, config)
    if states:
        return PoolingClient(url, config, getattr(torch, model.dtype))
    return OpenAiClient(url, config)
