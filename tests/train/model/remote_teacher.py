"""A teacher behind a URL, for tests: its client, and replies that come from no server."""

from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

import torch

from kdrl_train.batch import Rollouts
from kdrl_train.config import ModelConfig, TeacherConfig, TrainConfig
from kdrl_train.model.teacher.openai import connect
from kdrl_train.model.teacher.remote import RemoteTeacher


def rollouts(count: int = 4) -> Rollouts:
    """Make completions of 1 to `count` tokens after prompts of 2, all ids different."""
    completions = [torch.arange(r + 1) + 10 * r + 5 for r in range(count)]
    return Rollouts(
        prompt_ids=[torch.tensor([2, 3])] * count,
        completion_ids=completions,
        logprobs=[-c / 100 for c in completions],
        truncated=torch.zeros(count, dtype=torch.bool),
        texts=[""] * count,
    )


ALL = torch.ones(4, dtype=torch.bool)


VERSION = {
    "model": "m",
    "window": 256,
    "vocab_size": 258,
    "dtype": "float32",
    "tokenizer": "hash",
    "eos_ids": [0, 7],
    "weights": "hash",
    "fingerprint": "f",
    "chat_template": "{{ messages }}",
    "packages": {"torch": "2"},
    "hidden_size": 2,
    "logit_scale": 1.0,
    "softcap": 30.0,
}


class FakeExchange:
    """Replies without a server, with JSON by its path and with bytes, and keeps what was sent."""

    url = "http://host:1"

    def __init__(self) -> None:
        self.replies: dict[str, Any] = {"/version": VERSION}
        self.reply = b""
        self.sent: tuple[Any, ...] = ()

    async def json(self, _method: str, path: str, *_: Any) -> Any:
        return self.replies[path]

    async def data(self, *sent: Any) -> bytes:
        self.sent = sent
        return self.reply

    def start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            work.send(None)
        except StopIteration as end:
            future.set_result(end.value)
        return future

    def close(self) -> None: ...


class Connected:
    """Connects a RemoteTeacher to a scripted server, and keeps what it reports."""

    def __init__(self, url: str, api: str = "kdrl", **config: Any) -> None:
        self.said: list[str] = []
        self.config = TrainConfig(
            model=ModelConfig(teacher=url, teacher_api=api), teacher=TeacherConfig(**config)
        )
        self.client = connect(self.config.model, self.config.teacher)
        self.teacher = RemoteTeacher(self.client, self.config, 200, self.said.append)

    def __enter__(self) -> "Connected":
        return self

    def __exit__(self, *_: object) -> None:
        self.teacher.close()
        self.client.close()

    def all(self) -> list[torch.Tensor]:
        return self.teacher.collect(rollouts(), ALL, {})
