"""A vLLM server that restarts, hangs or is sick: the run waits, pushes again, or says why."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from fastapi.responses import StreamingResponse

from kdrl_train.errors import EngineError
from kdrl_train.exchange import BadReplyError
from kdrl_train.model.load import load_policy, load_tokenizer
from kdrl_train.model.policy import Policy
from kdrl_train.ranks import ALONE, World
from kdrl_train.rollouts.engines import open_engine, vllm_client, vllm_server
from kdrl_train.rollouts.engines.requests import CompletionRequest
from kdrl_train.runfolder.signals import Stopped
from tests.train.rollouts.scripted_vllm import REQUEST, SAMPLING, Config, Scripted, at, choice
from tests.train.servers import free_port, running, status
from tests.train.wrong_values import replaced

SLOW = pytest.mark.slow


def assert_pushed_twice(server: Scripted, engine: Any) -> None:
    """Assert that the last push was made again, and first under a label that nobody samples by."""
    first, loading, again = server.loads
    assert first == engine.label
    assert loading.startswith(f"{engine.label}, loading ")
    assert again == server.state["label"] == loading.replace("loading", "again")


@pytest.mark.fault("sick vLLM server")
def test_a_server_of_another_run_stops_the_run(
    opened: tuple[Any, Policy], server: Scripted
) -> None:
    engine, _ = opened
    server.state["label"] = "7 steps, of another"
    with pytest.raises(EngineError, match=r"after 3 steps, got 7 steps, of another: another run"):
        engine.generate(REQUEST)
    assert server.bodies == []


@pytest.mark.fault("sick vLLM server")
@pytest.mark.parametrize("label", [None, "a push that failed"])
def test_a_restarted_server_gets_the_weights_again_before_it_samples(
    opened: tuple[Any, Policy], server: Scripted, label: str | None
) -> None:
    engine, policy = opened
    said: list[str] = []
    engine.server.say = said.append
    server.state["label"], server.weights, server.calls = label, {}, []
    assert len(engine.generate(REQUEST).texts) == 4
    assert_pushed_twice(server, engine)
    assert server.calls == [
        *("kdrl_state", "kdrl_state"),  # the label; how it was started
        *("kdrl_load", "reset", "kdrl_load", "kdrl_state"),
    ]
    for name, weight in policy.model.named_parameters():
        assert torch.equal(server.weights[name], weight)
    (line,) = said
    assert line.endswith("was restarted: it has got the weights after 3 steps again")


@pytest.mark.fault("sick vLLM server")
def test_what_a_restarted_server_sampled_is_sampled_again(
    opened: tuple[Any, Policy], server: Scripted
) -> None:
    engine, _ = opened
    server.forgets = 1
    assert len(engine.generate(REQUEST).texts) == 4
    assert len(server.bodies) == 8
    seeds = [body["seed"] for body in server.bodies]
    assert sorted(seeds[:4]) == sorted(seeds[4:])
    assert server.state["label"].startswith(f"{engine.label}, again ")
    server.forgets = 99
    with pytest.raises(EngineError, match="got 3 restarts in one batch"):
        engine.generate(REQUEST)


@pytest.mark.fault("sick vLLM server")
def test_a_server_that_is_restarted_as_another_stops_the_run(
    opened: tuple[Any, Policy], server: Scripted
) -> None:
    engine, _ = opened
    server.state |= {"label": None, "dtype": "bfloat16"}
    with pytest.raises(EngineError, match=r"restarted in another way: .*'bfloat16'.* is needed"):
        engine.generate(REQUEST)
    assert server.bodies == []


@pytest.mark.fault("sick vLLM server")
def test_other_ranks_leave_the_push_to_rank_0(
    opened: tuple[Any, Policy], server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = opened
    engine.world = World(rank=1, size=2)
    calls = 0

    def rank_0_pushes() -> None:
        nonlocal calls
        calls += 1
        server.state["label"] = {1: None, 3: f"{engine.label}, loading 1", 6: engine.label}.get(
            calls, server.state["label"]
        )

    engine._restore(rank_0_pushes)
    assert server.state["label"] == engine.label
    monkeypatch.setattr(vllm_server, "RANK_WAIT_S", 0.1)
    server.state["label"] = None
    engine._restore(int)  # rank 0 has what it needs, and pushes nothing
    assert_pushed_twice(server, engine)


@pytest.mark.fault("sick vLLM server")
def test_what_was_sampled_while_another_rank_pushed_again_is_sampled_again(
    opened: tuple[Any, Policy], server: Scripted
) -> None:
    engine, _ = opened

    def restored_meanwhile(body: dict[str, Any]) -> Any:
        if len(server.bodies) == 3:  # it was restarted before, and has the right weights by now
            server.state["label"] = f"{engine.label}, again by rank 1"
        return server.complete(body)

    server.busy = restored_meanwhile
    assert len(engine.generate(REQUEST).texts) == 4
    assert len(server.bodies) == 8
    assert len(server.loads) == 1  # nothing more to push


@pytest.mark.fault("sick vLLM server")
@pytest.mark.parametrize(
    "code", [503, *(pytest.param(c, marks=SLOW) for c in (429, 500, 502, 504))]
)
def test_a_busy_server_is_tried_again(
    opened: tuple[Any, Policy], server: Scripted, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    engine, _ = opened
    complete = server.complete
    tries: Counter[int] = Counter()
    times: list[float] = []

    def busy(body: dict[str, Any]) -> Any:
        tries[body["seed"]] += 1
        if tries[body["seed"]] == 1:
            times.append(time.monotonic())
            return status(code, "later", retry_after="1" if code == 429 else "0")
        times.append(time.monotonic())
        return complete(body)

    monkeypatch.setattr(server, "busy", busy)
    assert len(engine.generate(REQUEST).texts) == 4
    assert set(tries.values()) == {2}
    assert (max(times) - min(times) >= 1) == (code == 429)


@pytest.mark.fault("sick vLLM server")
def test_a_server_that_is_away_is_waited_for(
    server: Scripted, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_client, "QUIET_S", 0.05)
    said: list[str] = []
    port = free_port()
    with running(server.app(), port) as url:
        settings = at(config, url)
        policy = load_policy(settings, None)
        tokenizer = load_tokenizer(settings.model.policy)
        engine = open_engine(settings, policy, tokenizer, ALONE)
        engine.server.say = said.append
        engine.load(policy, 3)
    server.state["label"] = None  # it starts again
    with ExitStack() as stack:
        start = partial(stack.enter_context, running(server.app(), port))
        later = threading.Timer(0.15, start)
        later.start()
        assert len(engine.generate(REQUEST).texts) == 4
        later.join()
        engine.close()
    assert said[0].startswith(f"the server at {url} does not reply, ConnectError")
    assert "is back after" in said[1]
    assert said[2].endswith("it has got the weights after 3 steps again")
    assert len(said) == 3


@pytest.mark.fault("stopped by a signal")
@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/collective_rpc", pytest.param("/reset_prefix_cache", marks=SLOW)],
)
def test_a_stop_does_not_wait_for_a_server_that_hangs(
    opened: tuple[Any, Policy], server: Scripted, path: str
) -> None:
    engine, policy = opened
    server.hangs = path
    start = time.monotonic()

    def poll() -> None:
        if time.monotonic() - start > 0.3:
            raise Stopped

    engine.poll = poll
    with pytest.raises(Stopped):
        engine.generate(REQUEST, poll) if "comp" in path else engine.load(policy, 4)
    assert time.monotonic() - start < 1.0
    server.release.set()


@pytest.mark.fault("sick vLLM server")
def test_a_dripping_server_ends_at_the_deadline(
    opened: tuple[Any, Policy], server: Scripted
) -> None:
    engine, _ = opened

    def drips() -> Iterator[bytes]:
        for _ in range(200):
            time.sleep(0.05)
            yield b" "

    server.busy = lambda _body: StreamingResponse(drips())
    engine.server.timeout_s = 0.3
    one = replace(REQUEST, prompts=[[5]], sampling=replace(SAMPLING, group_size=1))  # one reader
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"engine\.timeout_s = 0\.3 s, got no whole reply within"):
        engine.generate(one)
    assert time.monotonic() - start < 1.0


@pytest.mark.fault("sick vLLM server")
def test_a_wrong_value_in_a_completion_is_refused_or_not_read(
    opened: tuple[Any, Policy], monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    engine, _ = opened
    valid = {"id": "x", "choices": [choice([9, 0], [-1.0, -2.0]) | {"prompt_token_ids": [5]}]}
    tried = refused = 0
    request = replace(REQUEST, prompts=[[5]], sampling=replace(SAMPLING, group_size=1))
    for place, value, reply in replaced(valid):

        def replies(*_: Any, reply: Any = reply) -> list[Any]:
            try:
                return [vllm_client._completion(reply, [5])]
            except BadReplyError as error:
                raise EngineError(str(error)) from error

        monkeypatch.setattr(engine, "replies", replies)
        tried += 1
        try:
            rollouts = engine.generate(request)
        except EngineError:
            refused += 1
        else:
            if "token_logprobs." in place and value == -1:
                continue  # a log-probability as good as another
            assert [ids.tolist() for ids in rollouts.completion_ids] == [[9, 0]], (place, value)
            assert [x.tolist() for x in rollouts.logprobs] == [[-1.0, -2.0]], (place, value)
    record_property("tried", tried)
    assert refused > tried / 2


@pytest.mark.fault("sick vLLM server")
@pytest.mark.parametrize("endpoint", ["/v1/models", "kdrl_state", "/reset_prefix_cache"])
def test_a_wrong_value_from_the_server_is_refused_or_not_read(
    opened: tuple[Any, Policy], monkeypatch: pytest.MonkeyPatch, record_property: Any, endpoint: str
) -> None:
    engine, _ = opened
    state = {"label": engine.label, "dtype": "float32", "logprobs_mode": "processed_logprobs"}
    valid: dict[str, Any] = {
        "/v1/models": {"data": [{"id": "policy", "max_model_len": 256}]},
        "kdrl_state": {"results": [state]},
        "/reset_prefix_cache": {"success": True},
    }
    replies = dict(valid)
    monkeypatch.setattr(vllm_server, "RETRIES", 0)

    def send(_verb: str, path: str, body: Any = None, **_: Any) -> Any:
        return replies[body["method"] if body else path]

    monkeypatch.setattr(engine.server, "send", send)
    read = {
        "/v1/models": lambda: vllm_server.inspect(engine.server, engine.config),
        "kdrl_state": lambda: (
            vllm_server.inspect(engine.server, engine.config),
            engine._labels(int),
        ),
        "/reset_prefix_cache": lambda: engine._drop_cache(0, int),
    }[endpoint]
    expected, tried, refused = read(), 0, 0
    for place, value, reply in replaced(valid[endpoint]):
        replies[endpoint], tried = reply, tried + 1
        try:
            outcome = read()
        except (EngineError, ValueError):
            refused += 1
            continue
        if place.endswith("label") and outcome[1] in ({None}, {""}, {"7"}):
            continue  # other weights, which are told from ours by it
        if place.endswith("id") and type(value) is str:
            continue
        assert outcome == expected, (place, value)
    record_property("tried", tried)
    assert refused > tried / 2


@pytest.mark.fault("sick vLLM server")
def test_a_server_that_stays_away_stops_the_run(server: Scripted, config: Config) -> None:
    with running(server.app()) as url:
        settings = at(config, url)
        policy = load_policy(settings, None)
        engine = open_engine(settings, policy, load_tokenizer(settings.model.policy), ALONE)
    engine.server.timeout_s = 0.1
    with pytest.raises(EngineError, match=r"within engine.timeout_s = 0.1 s, got ConnectError"):
        engine.generate(REQUEST)
    with pytest.raises(EngineError, match=r"reply to /v1/completions within .* got ConnectError"):
        engine.server.complete("policy", [CompletionRequest([1], {})], 1, int)
    engine.close()


def test_the_file_of_the_weights_is_removed_with_the_engine(opened: tuple[Any, Policy]) -> None:
    engine, _ = opened
    assert engine.file.exists()
    engine.close()
    assert not engine.file.exists()
    engine.close()
