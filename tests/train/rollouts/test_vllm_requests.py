"""vLLM engines without vLLM: what they request and what they refuse, on a scripted server."""

import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import fastapi
import safetensors.torch
from transformers import MambaConfig

from kdrl_train import copies
from kdrl_train.config import EngineConfig, EvalConfig, SamplingConfig
from kdrl_train.errors import EngineError
from kdrl_train.model.load import load_policy, load_tokenizer
from kdrl_train.model.policy import Policy
from kdrl_train.ranks import ALONE
from kdrl_train.rollouts.engines import open_engine, vllm_server
from kdrl_train.rollouts.engines.requests import longest_sequence
from kdrl_train.rollouts.engines.vllm import require_vllm
from kdrl_train.start import preflight
from kdrl_train.tools.serve.app import RequireToken
from tests.pretended_gpu import move, pretend
from tests.train.rollouts.scripted_vllm import (
    PROMPTS,
    REQUEST,
    SAMPLING,
    Config,
    Scripted,
    at,
    choice,
)
from tests.train.servers import free_port, running, status


def test_what_a_server_receives(opened: tuple[Any, Policy], server: Scripted) -> None:
    engine, _ = opened
    rollouts = engine.generate(REQUEST)
    assert rollouts.truncated.tolist() == [False] * 4
    assert [ids.tolist() for ids in rollouts.completion_ids] == [[9, 0]] * 4
    assert [lps.tolist() for lps in rollouts.logprobs] == [[-1.0, -2.0]] * 4
    assert [ids.tolist() for ids in rollouts.prompt_ids] == [[5], [5], [20, 21], [20, 21]]
    seeds = [(body["prompt"][0], body["seed"]) for body in server.bodies]
    assert len(set(seeds)) == 4
    assert len({seed for _, seed in seeds}) == 4
    assert all(0 <= seed < 2**63 for _, seed in seeds)
    body = server.bodies[0]
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    expected = {"model": "policy", "max_tokens": 3, "temperature": 0.8, "stop_token_ids": [0]}
    expected |= {"logprobs": 0, "return_token_ids": True, "allowed_token_ids": None}
    assert {key: body[key] for key in neutral | expected} == neutral | expected
    server.bodies.clear()
    engine.generate(replace(REQUEST, prompts=PROMPTS[1:], first=1))  # another rank's share
    again = [(body["prompt"][0], body["seed"]) for body in server.bodies]
    assert sorted(again) == sorted(pair for pair in seeds if pair[0] == 20)
    server.bodies.clear()
    engine.generate(replace(REQUEST, greedy=True))
    assert {body["temperature"] for body in server.bodies} == {0.0}


def test_special_tokens_of_a_reply_are_text(opened: tuple[Any, Policy], server: Scripted) -> None:
    engine, _ = opened
    engine.tokenizer.add_tokens(["<answer>"], special_tokens=True)
    engine.columns = 259  # of a head with a column for it
    ids = [258, 1, 0]  # then padding, and the end of sequence
    server.choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-1.0, -2.0, -3.0]}}
    assert engine.generate(REQUEST).texts == ["<answer>"] * 4


def test_replies_are_counted_as_they_come(opened: tuple[Any, Policy], server: Scripted) -> None:
    server.slow = [20, 21]
    reports: list[tuple[int, int]] = []
    opened[0].generate(replace(REQUEST, report=lambda *now: reports.append(now)))
    assert reports[-1] == (4, 8)  # completions, tokens
    assert (2, 4) in reports
    assert all(tokens == 2 * done for done, tokens in reports)


def test_columns_that_a_teacher_lacks_are_not_allowed(server: Scripted, config: Config) -> None:
    with running(server.app()) as url:
        settings = at(config, url)
        policy = load_policy(settings, 200)
        engine = open_engine(settings, policy, load_tokenizer(settings.model.policy), ALONE)
        engine.generate(REQUEST)
        engine.close()
    assert server.bodies[0]["allowed_token_ids"] == list(range(200))


def test_a_push(opened: tuple[Any, Policy], server: Scripted) -> None:
    engine, policy = opened
    server.resets, server.calls = [True, False], []
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(0.5)
    first = server.state["label"]
    engine.load(policy, 4)
    assert engine.version == 4
    assert server.state["label"] != first
    assert server.calls == ["kdrl_load", "reset", "reset"]  # in this order; tried again
    expected = dict(policy.model.named_parameters())
    assert server.weights.keys() == expected.keys()
    assert all(torch.equal(server.weights[name], expected[name]) for name in expected)
    assert engine.file.exists()  # for a server that restarts


def test_a_push_from_a_gpu_waits_once_a_bucket(
    opened: tuple[Any, Policy], server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, policy = opened
    expected = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    monkeypatch.setattr(copies, "BUCKET_BYTES", 4096)
    with pretend(monkeypatch) as gpu:
        move(policy.model)
        engine.load(policy, 4)
    what = "kdrl_train/rollouts/engines/vllm_server.py VllmServerEngine.load: Event.synchronize"
    assert gpu.waits == {what: -(-4 * sum(p.numel() for p in expected.values()) // 4096)}
    assert server.weights.keys() == expected.keys()
    assert all(torch.equal(server.weights[name], expected[name]) for name in expected)


@pytest.mark.fault("attack on vLLM")
def test_the_file_of_the_weights_is_for_this_user_alone(
    opened: tuple[Any, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that another user has laid is not followed; the file is written as safetensors before
    0.8 did, which opened what it found."""
    engine, policy = opened
    victim = engine.file.with_name("victim")
    victim.write_text("precious", encoding="utf-8")
    engine.file.unlink()
    engine.file.symlink_to(victim)
    modes: list[int] = []

    def write(weights: dict[str, torch.Tensor], file: Path) -> None:
        file.write_bytes(safetensors.torch.save(weights))
        modes.append(stat.S_IMODE(file.lstat().st_mode))

    monkeypatch.setattr(vllm_server, "save_file", write)
    engine.load(policy, 4)
    engine.generate(REQUEST)
    assert (modes, victim.read_text(encoding="utf-8")) == ([0o600], "precious")


@pytest.mark.fault("sick vLLM server")
def test_a_push_that_fails_is_told_before_anything_is_sampled(
    opened: tuple[Any, Policy], server: Scripted
) -> None:
    engine, policy = opened
    server.resets = [False]
    engine.load(policy, 4)
    with pytest.raises(EngineError, match="must drop its prefix cache after a push, got a refusal"):
        engine.generate(REQUEST)
    server.dev_mode = False
    engine.load(policy, 5)
    with pytest.raises(EngineError, match="must reply to /collective_rpc, got status 404"):
        engine.generate(REQUEST)
    engine.file.unlink()
    engine.file.mkdir()
    engine.load(policy, 6)
    with pytest.raises(EngineError, match=r"must be written to .*engine_weights.safetensors, got"):
        engine.generate(REQUEST)
    assert server.bodies == []


REPLIES = {
    "short": (choice([9, 0], [-1.0]), "got 2 tokens and 1 log-probabilities for completion 0 of"),
    "empty": (choice([], []), "got 0 tokens and 0 log-probabilities"),
    "cut": (choice([9], [-1.0]), r"got 1 tokens of 3, ending with 9, not with \[0\]"),
    "out of range": (choice([258, 0], [-1.0] * 2), "got 258 in place of an id below 258 for tok"),
    "negative": (choice([-1, 0], [-1.0] * 2), "got -1 in place of an id below 258 for token 0"),
    "another prompt": (
        choice([9, 0], [-1.0] * 2) | {"prompt_token_ids": [6]},
        "got a completion of another prompt",
    ),
    "ran on": (choice([9, 0, 9], [-1.0] * 3), "got 3 tokens of 3, ending with 9"),
    "long": (choice([9] * 4, [-1.0] * 4), "got 4 tokens of 3"),
    "forbidden": (choice([9, 0], [-1.0, -9999.0]), r"log-probability -9999 for token 1 \(id 0\)"),
    "positive": (choice([9, 0], [0.1, -1.0]), r"log-probability 0.1 for token 0 \(id 9\)"),
    "old": ({"text": "9"}, "must return token_ids and log-probabilities, got .*: use vLLM 0.32"),
    "a page": (fastapi.Response("<html>"), "/v1/completions as vLLM 0.32 does, got '<html>'"),
    "refused": (status(400, "too long"), "reply to /v1/completions, got status 400: too long"),
}


@pytest.mark.fault("sick vLLM server")
@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_that_does_not_fit_stops_the_run(
    opened: tuple[Any, Policy], server: Scripted, name: str
) -> None:
    engine, _ = opened
    server.choice, message = REPLIES[name]
    with pytest.raises(EngineError, match=message):
        engine.generate(REQUEST)


def test_a_cut_completion(opened: tuple[Any, Policy], server: Scripted) -> None:
    engine, _ = opened
    server.choice = choice([9, 8, 7], [-1.0] * 3)
    assert engine.generate(REQUEST).truncated.all()


def test_a_window_that_is_too_short(opened: tuple[Any, Policy]) -> None:
    engine, _ = opened
    with pytest.raises(EngineError, match=r"got a window of 256 tokens for 2 \+ 255: start it"):
        engine.generate(replace(REQUEST, sampling=replace(SAMPLING, max_new_tokens=255)))


def test_a_poll_that_raises_stops_sampling(opened: tuple[Any, Policy]) -> None:
    engine, _ = opened
    with pytest.raises(KeyError):
        engine.generate(REQUEST, {}.popitem)


@pytest.mark.parametrize("fault", ["gone", "no development mode", "bfloat16", "no path"])
def test_a_server_that_is_not_ready(server: Scripted, config: Config, fault: str) -> None:
    server.dev_mode = fault != "no development mode"
    if fault == "bfloat16":
        server.state["dtype"] = "bfloat16"
    messages = {"gone": "ConnectError", "no development mode": "collective_rpc, got status 404"}
    messages |= {"bfloat16": "'dtype': 'bfloat16'.* where", "no path": "status 404"}
    with running(server.app()) as url:
        urls = {"gone": f"http://127.0.0.1:{free_port()}", "no path": f"{url}/x"}
        settings = at(config, urls.get(fault, url))
        policy = load_policy(settings, None)
        expected = f"engine.url must be a vLLM .*{messages[fault]}.*VLLM_SERVER_DEV_MODE=1 python"
        with pytest.raises(ValueError, match=expected):
            open_engine(settings, policy, load_tokenizer(settings.model.policy), ALONE)
        with pytest.raises(ValueError, match=expected):
            preflight.check_engine(settings)


def test_a_server_that_is_ready_passes_the_preflight(server: Scripted, config: Config) -> None:
    with running(server.app()) as url:
        said = f"{url}: policy, a window of 256 tokens"
        assert preflight.check_engine(at(config, url), 256) == said
        with pytest.raises(ValueError, match=r"completion, 257 tokens, got a window of 256: start"):
            preflight.check_engine(at(config, url), 257)


@pytest.mark.fault("attack on vLLM")
def test_a_server_across_a_public_network_is_warned_of(
    server: Scripted, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "is_exposed", lambda _url: True)
    with running(server.app()) as url:
        result = preflight._result("engine", lambda: preflight.check_engine(at(config, url)))
    assert (result.passed, result.warning) == (True, True)
    assert f"engine.url should be https, or in a private network, got {url}" in result.detail


@pytest.mark.fault("attack on vLLM")
def test_every_request_brings_the_key(
    server: Scripted, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = server.app()
    app.add_middleware(RequireToken, token="s3cret")
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    with running(app) as url:
        settings = at(config, url)
        policy = load_policy(settings, None)
        engine = open_engine(settings, policy, load_tokenizer(settings.model.policy), ALONE)
        engine.load(policy, 3)
        assert len(engine.generate(REQUEST).completion_ids) == 4
        engine.close()
        monkeypatch.delenv("VLLM_API_KEY")
        with pytest.raises(ValueError, match=r"reply to /v1/models.* got status 401"):
            preflight.check_engine(settings)


def test_without_vllm(
    config: Config, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    settings = config(engine=EngineConfig(kind="vllm"))
    with pytest.raises(ValueError, match=r"without vLLM, got: .*pip install 'kdrl-kernels\[vllm\]"):
        open_engine(
            settings, load_policy(settings, None), load_tokenizer(str(folders["student"])), ALONE
        )


def test_devices_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(current_platform=SimpleNamespace(device_type="cuda"))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.platforms", platform)
    with pytest.raises(ValueError, match="vLLM is built for, cuda, got cpu"):
        require_vllm(torch.device("cpu"), launched=False)
    with pytest.raises(ValueError, match="set CUDA_VISIBLE_DEVICES=1 and"):
        require_vllm(torch.device("cuda", 1), launched=False)
    for device, launched in ((torch.device("cuda", 1), True), (torch.device("cuda"), False)):
        assert require_vllm(device, launched=launched) is sys.modules["vllm"]


BAD = {
    "url must be set .* got None": {"kind": "vllm_server"},
    'url must be set .* got http://x:1 and "vllm"': {"kind": "vllm", "url": "http://x:1"},
    "memory_share must be greater than 0, got 0.0": {"kind": "vllm", "memory_share": 0.0},
    "memory_share must be at most 1, got 1.5": {"memory_share": 1.5},
    "timeout_s must be greater than 0": {"timeout_s": 0.0},
}


@pytest.mark.parametrize("message", BAD)
def test_settings_that_do_not_fit(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**BAD[message])


def test_the_longest_sequence_is_of_training_or_of_an_evaluation(config: Config) -> None:
    """It is the context that vLLM in this process is started with."""
    policy: Any = SimpleNamespace(model=SimpleNamespace(config=MambaConfig()))  # without a window
    settings = config(sampling=SamplingConfig(max_new_tokens=9))
    assert longest_sequence(settings, policy) == 1024 + 9
    held_out = EvalConfig(every=1, data=settings.data, max_new_tokens=20)
    longer = replace(settings.data, max_prompt_tokens=2000)
    for evaluation, tokens in (
        (held_out, 1024 + 20),
        (replace(held_out, sets={"a": longer}), 2000 + 20),
        (replace(held_out, max_new_tokens=None, sets={"a": longer}), 2000 + 9),
        (replace(held_out, every=0), 1024 + 9),
    ):
        assert longest_sequence(replace(settings, eval=evaluation), policy) == tokens
