"""Sick replies of a teacher: slow ones, and each value replaced by wrong ones."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from fastapi.responses import StreamingResponse

from kdrl_train import waiting
from kdrl_train.config import ModelConfig, TeacherConfig
from kdrl_train.model.teacher import remote
from kdrl_train.model.teacher.client import UNKNOWN, Query, TeacherError
from kdrl_train.model.teacher.openai import OpenAiClient, connect
from tests.train.model.remote_teacher import ALL, VERSION, Connected, FakeExchange, rollouts
from tests.train.servers import Scripted, running
from tests.train.wrong_values import replaced

MODELS = {"object": "list", "data": [{"id": "m", "max_model_len": 257}]}
KDRL_SCORES = {"logprobs": [[-1.5, -0.25]], "fingerprint": "f"}
ENTRIES = [
    None,
    {"3": {"logprob": -9.0, "rank": 1, "decoded_token": "c"}},
    {"5": {"logprob": -1.5, "rank": 1, "decoded_token": "e"}},
    {"6": {"logprob": -0.25, "rank": 2, "decoded_token": "f"}},
]
OPENAI_SCORES = {"id": "x", "choices": [{"index": 0, "prompt_logprobs": ENTRIES}]}
REPLIES = {
    "/version": VERSION,
    "/score": KDRL_SCORES,
    "/v1/models": MODELS,
    "/v1/completions": OPENAI_SCORES,
}
QUERY = Query("one", [2, 3], [5, 6])
ALLOWED = [
    ("window", None),  # a model without a window
    ("data.0.max_model_len", None),
    ("data.0.max_model_len", "nothing"),
    ("eos_ids.0", "nothing"),
    ("eos_ids.1", "nothing"),
    ("weights", None),  # an older server
    ("weights", "nothing"),
    ("chat_template", None),
    ("chat_template", "nothing"),
    ("hidden_size", "nothing"),  # an older server
    ("softcap", None),
    *(("softcap", number) for number in (0.5, 2.5)),
    *(("logit_scale", number) for number in (0.5, 2.5)),
]
"""Changes that make another valid reply; so does another text of the same meaning, or -1 where a
log-probability stands."""


def outcome(api: str, replies: dict[str, Any], exchange: FakeExchange) -> Any:
    """Return what a new client makes of the replies."""
    exchange.replies = replies
    connected = connect(ModelConfig(teacher=exchange.url, teacher_api=api), TeacherConfig())
    texts = connected.texts(QUERY) if isinstance(connected, OpenAiClient) else None
    template = "unknown" if connected.chat_template is UNKNOWN else connected.chat_template
    return connected.info, template, connected.logprobs(QUERY).tolist(), texts


def is_another_valid_reply(place: str, value: Any, text: bool) -> bool:
    if (place, value) in ALLOWED or (text and type(value) is str):
        return True
    if place.endswith(("eos_ids", "chat_template")) and value in ([], {}, {"a": 1}):
        return True
    if place.endswith("decoded_token") and value in (None, "nothing"):
        return True
    return place.rpartition(".")[2] in ("0", "1", "logprob") and value == -1


@pytest.mark.fault("sick teacher server")
@pytest.mark.parametrize(
    ("api", "path"),
    [
        ("kdrl", "/version"),
        ("kdrl", "/score"),
        ("openai", "/v1/models"),
        ("openai", "/v1/completions"),
    ],
)
def test_a_wrong_value_is_refused_or_not_read(
    api: str, path: str, exchange: FakeExchange, record_property: Any
) -> None:
    expected, tried, messages = outcome(api, REPLIES, exchange), 0, []
    assert expected[2] == [-1.5, -0.25]
    for place, value, reply in replaced(REPLIES[path]):
        node: Any = REPLIES[path]
        for key in place.split(".") if place else ():
            node = node[int(key) if isinstance(node, list) else key]
        tried += 1
        try:
            got = outcome(api, REPLIES | {path: reply}, exchange)
        except TeacherError as error:
            messages.append(str(error))
            continue
        if not is_another_valid_reply(place, value, isinstance(node, str)):
            assert got == expected, (place, value)
    record_property("tried", tried)
    assert len(messages) > tried / 3
    for message in messages:
        assert "the teacher at http://host:1 must" in message or "teacher.name" in message
        assert len(message) < 1000


def drips(_ids: list[int], _prompt_tokens: int) -> Any:
    """Reply by a byte every 50 ms, so that no single wait is long."""

    def parts() -> Iterator[bytes]:
        for _ in range(200):
            time.sleep(0.05)
            yield b" "

    return StreamingResponse(parts())


@pytest.fixture
def dripping(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Scripted, str]]:
    monkeypatch.setattr(waiting, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "QUIET_S", 0.1)
    server = Scripted(drips)
    with running(server.app()) as url:
        yield server, url


@pytest.mark.fault("sick teacher server")
def test_a_dripping_server_is_away(dripping: tuple[Scripted, str]) -> None:
    server, url = dripping
    start = time.monotonic()
    with Connected(url, timeout_s=0.2, deadline_s=0.7, concurrency=4) as connected:
        with pytest.raises(TeacherError, match=r"deadline_s = 0\.7 s, got no whole reply within"):
            connected.all()
        assert len(connected.said) == 1  # the outage
    assert 0.7 <= time.monotonic() - start < 1.7
    assert min(server.queries.values()) >= 2  # sent again after timeout_s


@pytest.mark.fault("stopped by a signal")
def test_a_stop_does_not_wait_for_a_dripping_server(dripping: tuple[Scripted, str]) -> None:
    server, url = dripping

    def poll() -> None:
        if len(server.queries) == 4:
            raise KeyError

    with Connected(url, timeout_s=60) as connected:
        with pytest.raises(KeyError):
            connected.teacher.collect(rollouts(), ALL, {}, poll)
        start = time.monotonic()
    assert time.monotonic() - start < 0.5
