"""Replies of arrays by a teacher's server: read whole, checked, and refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from safetensors.torch import save
from torch import Tensor

from kdrl_train.batch import TopkScores
from kdrl_train.config import ModelConfig, TeacherConfig, TrainConfig
from kdrl_train.exchange import REPLY_BYTES
from kdrl_train.method.config import MethodConfig
from kdrl_train.model.teacher.client import KdrlClient, Query, TeacherError
from kdrl_train.model.teacher.openai import connect
from kdrl_train.model.teacher.remote import RemoteTeacher
from kdrl_train.model.teacher.replies import most_bytes, topk_problem
from kdrl_train.tools.serve import replies
from kdrl_train.tools.serve.app import make
from tests.train.model.remote_teacher import ALL, VERSION, FakeExchange, rollouts
from tests.train.servers import running, service, teacher_app

QUERY = Query("one", [2, 3], [5, 6], sampled_vocab_size=200, temperature=0.5)
STATES = {"0.states": torch.tensor([[1.0, 2.0], [3.0, -4.0]])}
TOPK = {
    "0.logprobs": torch.tensor([-1.0, -2.0]),
    "0.topk_ids": torch.tensor([[7, 9], [4, -1]], dtype=torch.int32),
    "0.topk_logprobs": torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]),
}


@pytest.fixture
def scripted(exchange: FakeExchange) -> Callable[[bytes], KdrlClient]:
    """Give scripted(reply), which makes a client of a server with this reply."""

    def connected(reply: bytes) -> KdrlClient:
        exchange.reply = reply
        made = connect(ModelConfig(teacher=exchange.url), TeacherConfig())
        assert isinstance(made, KdrlClient)
        return made

    return connected


def test_arrays_are_requested_and_read(
    scripted: Callable[[bytes], KdrlClient], exchange: FakeExchange
) -> None:
    states = scripted(save(STATES, {"fingerprint": "f"})).states(QUERY, 3.0)
    assert states.tolist() == STATES["0.states"].tolist()
    sequences = [{"ids": [2, 3, 5, 6], "prompt_tokens": 2}]
    body = {"sequences": sequences, "vocab_size": 200}
    assert exchange.sent == ("POST", "/hidden", body, 3.0, REPLY_BYTES + 2 * 2 * 4)
    topk = scripted(save(TOPK, {"fingerprint": "f"})).topk(QUERY, 2)
    assert (topk.ids.tolist(), topk.ids.dtype) == ([[7, 9], [4, -1]], torch.int64)
    assert topk.logprobs.tolist() == [[-1.0, -2.0], [-0.5, 0.0]]
    assert topk.sampled.tolist() == [-1.0, -2.0]
    body |= {"temperature": 0.5, "topk": 2}
    assert exchange.sent == ("POST", "/score", body, 120.0, REPLY_BYTES + 2 * 4 + 2 * 2 * 8)


def arrays(changed: dict[str, Tensor], base: dict[str, Tensor], mark: str = "f") -> bytes:
    return save(base | changed, {"fingerprint": mark})


def with_header(header: Any, numbers: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


GOOD = arrays({}, STATES)
SICK: dict[str, tuple[str, bytes, str]] = {
    "nothing": ("states", b"", "no safetensors"),
    "cut": ("states", GOOD[:-1], "no safetensors"),
    "too long": ("states", GOOD + b"x", "no safetensors"),
    "a header without end": ("states", b"\xff" * 64, "no safetensors"),
    "json": ("states", b'{"states": [[1.0, 2.0], [3.0, 4.0]]}', "no safetensors"),
    "depth": ("states", with_header("x")[:8] + b"[" * 99, "no safetensors"),
    "no fingerprint": ("states", save(STATES), "without __metadata__"),
    "a number as fingerprint": (
        "states",
        with_header({"__metadata__": {"fingerprint": 1}}),
        "no safetensors",
    ),
    "another model": ("states", arrays({}, STATES, "g"), "another one than m (float32)"),
    "a state too few": (
        "states",
        arrays({"0.states": torch.ones(1, 2)}, {}),
        "states of [1, 2] torch.float32 in place of [2, 2] torch.float32",
    ),
    "longer states": ("states", arrays({"0.states": torch.ones(2, 3)}, {}), "of [2, 3]"),
    "turned states": ("states", arrays({"0.states": torch.ones(2, 2, 1)}, {}), "of [2, 2, 1]"),
    "another dtype": (
        "states",
        arrays({"0.states": torch.ones(2, 2).bfloat16()}, {}),
        "torch.bfloat16 in place of",
    ),
    "another name": (
        "states",
        arrays({"1.states": torch.ones(2, 2)}, {}),
        "arrays ['1.states'] in",
    ),
    "one array more": ("states", arrays({"1.states": torch.ones(2, 2)}, STATES), "in place of"),
    "NaN": (
        "states",
        arrays({"0.states": torch.tensor([[1.0, torch.nan], [1.0, 1.0]])}, {}),
        "finite states for one (2 tokens after a prompt of 2), got others",
    ),
    "a forbidden id": (
        "topk",
        arrays({"0.topk_ids": torch.tensor([[7, 200], [4, 5]], dtype=torch.int32)}, TOPK),
        "got an id outside of [0, 200)",
    ),
    "an id below": (
        "topk",
        arrays({"0.topk_ids": torch.tensor([[7, -2], [4, 5]], dtype=torch.int32)}, TOPK),
        "got an id outside of [0, 200)",
    ),
    "an id twice": (
        "topk",
        arrays({"0.topk_ids": torch.tensor([[7, 7], [4, 5]], dtype=torch.int32)}, TOPK),
        "got an id twice at one place",
    ),
    "no token": (
        "topk",
        arrays({"0.topk_ids": torch.tensor([[7, 9], [-1, -1]], dtype=torch.int32)}, TOPK),
        "got no token at one place",
    ),
    "too much": (
        "topk",
        arrays({"0.topk_logprobs": torch.tensor([[-0.1, -0.2], [-1.0, -1.0]])}, TOPK),
        "got probabilities that sum to 1.72",
    ),
    "NaN among them": (
        "topk",
        arrays({"0.topk_logprobs": torch.tensor([[-1.0, torch.nan], [-1.0, -1.0]])}, TOPK),
        "got probabilities that sum to nan",
    ),
    "a sampled token above 0": (
        "topk",
        arrays({"0.logprobs": torch.tensor([-1.0, 0.5])}, TOPK),
        "got 0.5 for token 1 (id 6)",
    ),
    "fewer tokens": (
        "topk",
        arrays({}, {k: v[..., :1].contiguous() for k, v in TOPK.items()}),
        "of [1]",
    ),
}


@pytest.mark.fault("sick teacher server")
@pytest.mark.parametrize("name", SICK)
def test_a_sick_reply_is_refused(scripted: Callable[[bytes], KdrlClient], name: str) -> None:
    kind, reply, message = SICK[name]
    teacher = scripted(reply)
    with pytest.raises(TeacherError) as refused:
        teacher.states(QUERY) if kind == "states" else teacher.topk(QUERY, 2)
    text = str(refused.value)
    assert text.startswith("the teacher at http://host:1 must ")
    assert message in text
    assert len(text) < 500


def test_an_older_server_is_named(
    scripted: Callable[[bytes], KdrlClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(VERSION, "hidden_size")
    teacher = scripted(GOOD)
    for get in (teacher.states, lambda query: teacher.topk(query, 2)):
        with pytest.raises(TeacherError, match="got a server of an older version: serve it with"):
            get(QUERY)


def test_the_mass_of_a_place_counts_only_its_tokens() -> None:
    ids = torch.tensor([[3, -1]])
    assert topk_problem(TopkScores(torch.zeros(1), ids, torch.tensor([[-0.1, 0.0]])), 9) is None
    assert most_bytes({"states": (torch.bfloat16, (3, 5))}) == REPLY_BYTES + 30


def test_a_real_server_and_its_client_agree(folders: dict[str, Path]) -> None:
    """The K likeliest tokens are those of all; the head on the states gives the same scores."""
    with running(teacher_app(folders["teacher"])) as url:
        real = connect(ModelConfig(teacher=url), TeacherConfig())
        assert isinstance(real, KdrlClient)
        try:
            topk, logprobs = real.topk(QUERY, 200), real.logprobs(QUERY)
            states = real.states(QUERY)
        finally:
            real.close()
    assert (real.info.hidden_size, real.info.logit_scale, real.info.softcap) == (48, 1.0, None)
    assert states.shape == (2, 48)
    torch.testing.assert_close(topk.logprobs.exp().sum(dim=1), torch.ones(2))
    torch.testing.assert_close(topk.sampled, logprobs)
    at = (topk.ids == torch.tensor(QUERY.completion_ids)[:, None]).nonzero(as_tuple=True)
    torch.testing.assert_close(topk.logprobs[at], logprobs)


@pytest.mark.slow
@pytest.mark.fault("sick teacher server")
def test_a_query_is_sent_again_where_there_is_no_room(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for the states of one completion at a time; the others come after a 503."""
    monkeypatch.setattr(replies, "REPLIES", 1)
    refused: list[int] = []
    hold = replies.Replies.of

    def counted(self: Any, size: int) -> Any:
        refused.append(self.total + size > self.most)
        return hold(self, size)

    monkeypatch.setattr(replies.Replies, "of", counted)
    largest = 4 * 4 * 48
    method = MethodConfig(kd="rkl")
    app = make(service(folders["teacher"]), reply_bytes=largest)
    with running(app) as url:
        settings = TrainConfig(
            model=ModelConfig(teacher=url), teacher=TeacherConfig(head="h"), method=method
        )
        real = connect(settings.model, settings.teacher)
        with RemoteTeacher(real, settings, 258, lambda _: None) as teacher:
            states = teacher.collect(rollouts(), ALL, {})
    assert [len(part) for part in states] == [1, 2, 3, 4]
    assert sum(refused) > 0
