"""Talks to a teacher that vLLM serves, in the formats of its sources of 2026.

Log-probabilities: the reply to POST /v1/completions with `"prompt": ids, "max_tokens": 1,
"prompt_logprobs": 0` holds `choices[0].prompt_logprobs`, which is null for the first token, and for
each other one a mapping from its id, as text, to {"logprob", "rank", "decoded_token"}. They are at
temperature 1, whatever the request says, over all columns of the model's head; -inf is sent as
-9999.
"""

from typing import Any

from kdrl_train.config import ModelConfig, TeacherConfig
from kdrl_train.exchange import BadReplyError, member, only, typed
from kdrl_train.model.teacher.client import (
    KdrlClient,
    Query,
    TeacherClient,
    TeacherError,
    TeacherInfo,
)
from kdrl_train.model.teacher.replies import integer, of_completion


class OpenAiClient(TeacherClient):
    """Talks to vLLM, or to another server that returns prompt_logprobs as vLLM does."""

    def _info(self, name: str | None) -> TeacherInfo:
        model = self._model(name)
        # the server generates one token for each query, which needs a place in the window too
        longest = model.get("max_model_len")
        return TeacherInfo(model=model["id"], window=None if longest is None else longest - 1)

    def _model(self, name: str | None) -> dict[str, Any]:
        """Return what the server says of the model with this name; None: of its only one."""
        reply = self._send("its models", "/v1/models", None, self.timeout_s)
        try:
            models = {member(m, "id", str): m for m in member(reply, "data", list)}
            for model in models.values():
                if model.get("max_model_len") is not None:
                    integer(model["max_model_len"], "max_model_len", 1)
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
            entries = choice.get("prompt_logprobs")
            if entries is not None:
                return of_completion(entries, ids, len(query.prompt_ids))
        except BadReplyError as error:
            raise self._wrong(str(query), error) from error
        raise TeacherError(
            f"the teacher at {self.url} must return prompt log-probabilities, got none for "
            f"{query}: use vLLM, or `python -m kdrl_train serve`"
        )


def connect(model: ModelConfig, config: TeacherConfig, url: str | None = None) -> TeacherClient:
    """Make a client of the server at a URL; None: model.teacher. Raises: TeacherError unless it is
    ready."""
    url = url or str(model.teacher)
    return KdrlClient(url, config) if model.teacher_api == "kdrl" else OpenAiClient(url, config)
