"""remote teacher: it sends queries again, waits for a server, and checks every reply."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from kdrl_train import waiting
from kdrl_train.exchange import NoReplyError
from kdrl_train.model.teacher import client, openai, remote
from kdrl_train.model.teacher.client import TeacherError
from tests.train.model.remote_teacher import ALL, Connected, rollouts
from tests.train.servers import Scripted, by_position, free_port, running, status, talking

APIS = ("kdrl", "openai")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(waiting, "LONGEST_WAIT_S", 0.05)
    monkeypatch.setattr(remote, "QUIET_S", 0.1)


def expected(r: int) -> torch.Tensor:
    ids = [2, 3, *rollouts().completion_ids[r].tolist()]
    return torch.tensor(by_position(ids, 2))


@pytest.fixture
def scripted() -> Iterator[Callable[..., tuple[Scripted, str]]]:
    """Give scripted(score, **info), which starts a server in a thread: the server and its URL."""
    with ExitStack() as stack:

        def start(score: Callable = by_position, **info: Any) -> tuple[Scripted, str]:
            server = Scripted(score, **info)
            return server, stack.enter_context(running(server.app()))

        yield start


@pytest.mark.parametrize("api", APIS)
def test_each_completion_gets_its_own_tokens(scripted: Callable, api: str) -> None:
    server, url = scripted()
    with Connected(url + ("/v1/" if api == "openai" else "/"), api) as connected:
        logprobs = connected.all()
    for r in range(4):
        torch.testing.assert_close(logprobs[r], expected(r))
        assert logprobs[r].dtype == torch.float32
    assert set(server.queries.values()) == {1}
    body = server.bodies[0]
    if api == "kdrl":
        assert (body["temperature"], body["vocab_size"]) == (1.0, 200)
    else:
        ids = body.pop("prompt")
        assert ids[:2] == [2, 3]
        assert body == {
            "model": "scripted",
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
        }


def test_only_the_selected_are_sent_and_each_once(scripted: Callable) -> None:
    server, url = scripted()
    with Connected(url) as connected:
        early = connected.teacher.query(rollouts(), torch.tensor([True, False, True, False]))
        [future.result() for future in early.values()]
        selected = torch.tensor([True, True, False, False])
        logprobs = connected.teacher.collect(rollouts(), selected, early)
        nothing = connected.teacher.collect(rollouts(), ~ALL, {})
    assert [x is not None for x in logprobs] == [True, True, False, False]
    torch.testing.assert_close(logprobs[1], expected(1))
    assert nothing == [None] * 4
    assert server.queries == {(2, 3, 5): 1, (2, 3, 25, 26, 27): 1, (2, 3, 15, 16): 1}


@pytest.mark.fault("sick teacher server")
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("code", [429, 500, 502, 503])
def test_a_query_to_a_busy_server_is_sent_again(
    scripted: Callable, monkeypatch: pytest.MonkeyPatch, api: str, code: int
) -> None:
    tries: Counter = Counter()

    def busy_twice(ids: list[int], prompt_tokens: int) -> Any:
        tries[tuple(ids)] += 1
        if tries[tuple(ids)] < 3:
            return status(code, "later")
        return by_position(ids, prompt_tokens)

    monkeypatch.setattr(remote, "QUIET_S", 60.0)
    server, url = scripted(busy_twice)
    with Connected(url, api) as connected:
        logprobs = connected.all()
    torch.testing.assert_close(logprobs[3], expected(3))
    assert set(server.queries.values()) == {3}
    assert connected.said == []  # a full queue is no outage


def test_the_server_says_when_to_come_again(scripted: Callable) -> None:
    times: list[float] = []

    def once(ids: list[int], prompt_tokens: int) -> Any:
        times.append(time.monotonic())
        if len(times) == 1:
            return status(503, retry_after="1")
        return by_position(ids, prompt_tokens)

    _, url = scripted(once)
    with Connected(url) as connected:
        connected.teacher.collect(rollouts(), torch.tensor([True, False, False, False]), {})
    assert times[1] - times[0] >= 1.0


@pytest.mark.fault("sick teacher server")
def test_a_hung_request_is_sent_again(scripted: Callable) -> None:
    release = threading.Event()
    hung: set[tuple] = set()

    def hang_once(ids: list[int], prompt_tokens: int) -> Any:
        if tuple(ids) not in hung:
            hung.add(tuple(ids))
            release.wait(10)
        return by_position(ids, prompt_tokens)

    server, url = scripted(hang_once)
    with Connected(url, timeout_s=0.3) as connected:
        logprobs = connected.all()
        release.set()
    torch.testing.assert_close(logprobs[2], expected(2))
    assert set(server.queries.values()) == {2}


def test_concurrency_is_bounded_and_used(scripted: Callable) -> None:
    barrier = threading.Barrier(3)

    def together(ids: list[int], prompt_tokens: int) -> Any:
        barrier.wait(10)  # passes only when three queries wait at once
        time.sleep(0.02)
        return by_position(ids, prompt_tokens)

    server, url = scripted(together)
    with Connected(url, concurrency=3) as connected:
        many = rollouts(12)
        logprobs = connected.teacher.collect(many, torch.ones(12, dtype=torch.bool), {})
    assert len(logprobs) == 12
    assert server.most_at_once == 3


@pytest.mark.fault("sick teacher server")
def test_an_outage_pauses_and_is_reported_once() -> None:
    server = Scripted(by_position)
    port = free_port()
    with running(server.app(), port) as url:
        connected = Connected(url, concurrency=2)
    with connected:
        futures = connected.teacher.query(rollouts(), ALL)
        deadline = time.monotonic() + 10
        while not connected.said:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)  # several more tries of each
        assert not any(future.done() for future in futures.values())
        with running(server.app(), port):
            logprobs = connected.teacher.collect(rollouts(), ALL, futures)
    torch.testing.assert_close(logprobs[3], expected(3))
    paused, back = connected.said
    assert paused.startswith(f"the teacher at {url} does not reply, ConnectError")
    assert paused.endswith("waiting for it, 1800 s at most")
    assert re.fullmatch(rf"the teacher at {url} is back after \d+ s", back)


@pytest.mark.fault("sick teacher server")
def test_after_the_deadline_everything_fails_at_once() -> None:
    server = Scripted(by_position)
    with running(server.app()) as url:
        connected = Connected(url, concurrency=2, deadline_s=0.5)
    with connected:
        start = time.monotonic()
        message = r"must reply within teacher\.deadline_s = 0\.5 s, got ConnectError.*--resume"
        with pytest.raises(TeacherError, match=message):
            connected.all()
        again = time.monotonic()
        assert again - start >= 0.5
        with pytest.raises(TeacherError, match=message):
            connected.all()
        assert time.monotonic() - again < 0.4  # nobody waits for another deadline
    assert server.queries == {}


@pytest.mark.fault("stopped by a signal")
def test_an_end_of_the_client_is_no_outage(scripted: Callable) -> None:
    """The screen of a run that stops must not say that it waits for the teacher."""
    scoring, stopped = threading.Event(), threading.Event()

    def slow(ids: list[int], prompt_tokens: int) -> Any:
        scoring.set()
        stopped.wait(5)
        return by_position(ids, prompt_tokens)

    _, url = scripted(slow)
    with Connected(url) as connected:
        connected.teacher.query(rollouts(), ALL)
        assert scoring.wait(5)
        time.sleep(0.2)  # QUIET_S has passed
    stopped.set()
    assert connected.said == []


@pytest.mark.slow
def test_the_deadline_counts_from_the_last_reply_to_any_query(scripted: Callable) -> None:
    replied: list[int] = []

    def first_one_last(ids: list[int], prompt_tokens: int) -> Any:
        if ids[2] == 5 and len(replied) < 3:
            return status(503)
        time.sleep(1.5)
        replied.append(ids[2])
        return by_position(ids, prompt_tokens)

    _, url = scripted(first_one_last)
    with Connected(url, concurrency=2, deadline_s=4.0) as connected:
        logprobs = connected.all()
    assert replied == [15, 25, 35, 5]  # the first waited for 4.5 s
    torch.testing.assert_close(logprobs[0], expected(0))


def last(value: Any) -> Callable[[list[int], int], Any]:
    """Make a score function whose last log-probability is `value`."""
    return lambda ids, n: [*by_position(ids, n)[:-1], value]


def raw(code: int, text: str) -> Callable[[list[int], int], Any]:
    return lambda _ids, _n: status(code, text)


WRONG = {
    "nothing": (last(None), r"got None for token 2 \(id 27\)"),
    "minus infinity": (last(-9999.0), r"got -9999 for token 2 \(id 27\)"),
    "positive": (last(3.5), r"must give a finite log-probability .* got 3\.5 for token 2"),
    "too few": (
        lambda ids, n: by_position(ids, n)[1:],
        r"each token of .*, got 2 for 3 tokens|format",
    ),
    "text": (raw(200, "<html>"), "in JSON, got '<html>'"),
    "other JSON": (raw(200, "[1]"), r"format of model\.teacher_api, got \[1\] without"),
    "refused": (raw(404, "no such model"), "got status 404: no such model; see"),
}


@pytest.mark.fault("sick teacher server")
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_reply_stops_the_run(scripted: Callable, api: str, name: str) -> None:
    score, message = WRONG[name]
    _, url = scripted(score)
    with Connected(url, api) as connected, pytest.raises(TeacherError, match=message) as error:
        connected.teacher.collect(rollouts(), torch.tensor([False, False, True, False]), {})
    assert f"the teacher at {url} must" in str(error.value)
    assert "completion 2 of the step (3 tokens after a prompt of 2)" in str(error.value)


def test_a_server_without_prompt_logprobs_is_refused(scripted: Callable) -> None:
    reply = '{"choices": [{"text": "!", "prompt_logprobs": null}]}'
    _, url = scripted(raw(200, reply))
    message = "must return prompt log-probabilities, got none for completion . of the step"
    with Connected(url, "openai") as connected, pytest.raises(TeacherError, match=message):
        connected.all()


@pytest.mark.fault("another teacher")
def test_a_server_that_came_back_as_another_is_refused(scripted: Callable) -> None:
    server, url = scripted()
    with Connected(url) as connected:
        connected.all()
        server.info["fingerprint"] = "two"
        message = r"must stay the same during a run, got another one than scripted \(float32\)"
        with pytest.raises(TeacherError, match=message):
            connected.all()


@pytest.mark.fault("another teacher")
@pytest.mark.parametrize("change", [{"root": "/b"}, {"max_model_len": 8}, {"id": "other"}])
def test_what_an_openai_server_says_of_its_model_must_stay(
    scripted: Callable, change: dict[str, Any]
) -> None:
    """It has no fingerprint: a server that was started with another model is seen once a step."""
    server, url = scripted()
    server.models[0]["root"] = "/a"
    with Connected(url, "openai") as connected:
        connected.all()
        server.models[0] |= change
        now = server.models[0]
        message = (
            r"must stay the same during a run, got another one than scripted from /a with a window "
            rf"of 255 tokens, scripted from {now['root']} with a window of "
            rf"{now['max_model_len'] - 1} tokens: restart the server as it was"
        )
        if "id" in change:
            message = r"teacher\.name must be a model of .*, got scripted: it has other"
        with pytest.raises(TeacherError, match=message):
            connected.all()


@pytest.mark.fault("another teacher")
def test_the_name_in_the_replies_of_an_openai_server_must_stay(
    scripted: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, reply = ["a", "a", "b"], Scripted.openai

    def named(self: Scripted, body: dict[str, Any]) -> Any:
        return reply(self, body) | {"model": names.pop(0)}

    monkeypatch.setattr(Scripted, "openai", named)
    _, url = scripted()
    with Connected(url, "openai", concurrency=1) as connected:
        message = r"must stay the same during a run, got another one than a, b: restart the"
        with pytest.raises(TeacherError, match=message):
            connected.all()


def test_a_server_that_goes_before_it_says_what_it_has_is_waited_for(
    scripted: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = scripted()
    with Connected(url, "openai") as connected:
        describe, tries = connected.client._model, []

        def away_once(*arguments: Any) -> Any:
            tries.append(1)
            if len(tries) == 1:
                raise NoReplyError("status 503")
            return describe(*arguments)

        monkeypatch.setattr(connected.client, "_model", away_once)
        torch.testing.assert_close(connected.all()[3], expected(3))
    assert tries == [1, 1]


def test_models_of_an_openai_server_are_chosen_by_name(scripted: Callable) -> None:
    server, url = scripted()
    server.models = [{"id": "a", "max_model_len": 256}, {"id": "b"}]
    for name in (None, "c"):
        with pytest.raises(
            TeacherError, match=rf"teacher\.name must be .*, got {name}: it has a, b"
        ):
            Connected(url, "openai", name=name)
    with Connected(url, "openai", name="a") as connected:
        assert (connected.client.info.model, connected.client.info.window) == ("a", 255)
        assert connected.client.vocab_size is None
    with Connected(url, "openai", name="b") as connected:
        assert connected.client.info.window is None


@pytest.mark.parametrize("api", APIS)
def test_a_silent_server_costs_seconds_at_the_start(
    monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    for module in (client, openai):
        monkeypatch.setattr(module, "FIRST_REPLY_S", 0.1)
    with talking(lambda _: time.sleep(1)) as url:
        message = r"model\.teacher must reply, got no whole reply within 0\.1 s from .*: start it"
        with pytest.raises(TeacherError, match=message):
            Connected(url, api)


@pytest.mark.parametrize("api", APIS)
def test_a_server_must_be_there_at_the_start(scripted: Callable, api: str) -> None:
    _, url = scripted()
    with pytest.raises(TeacherError, match=r"model\.teacher must reply, got ConnectError .* start"):
        Connected(f"http://127.0.0.1:{free_port()}", api)
    with pytest.raises(TeacherError, match=r"must reply to GET /v\S* with .*, got status 404"):
        Connected(f"{url}/elsewhere", api)
    with pytest.raises(TeacherError, match=r"model\.teacher must be a URL"):
        Connected("http://host:port", api)


def test_version_of_another_server_is_refused(scripted: Callable) -> None:
    server, url = scripted()
    del server.info["eos_ids"]
    with pytest.raises(TeacherError, match=r"without eos_ids when reading /version"):
        Connected(url)
