"""vLLM itself, on the CPU, as engine and as teacher: `bash tests/vllm.sh`."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from kdrl_train.batch import Rollouts
from kdrl_train.config import EngineConfig, ModelConfig, SamplingConfig, TeacherConfig, TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.errors import EngineError
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.model.load import load_policy, load_tokenizer
from kdrl_train.model.policy import Policy
from kdrl_train.model.teacher.client import Query
from kdrl_train.model.teacher.openai import connect
from kdrl_train.ranks import ALONE
from kdrl_train.rollouts.engines import open_engine
from kdrl_train.rollouts.engines.vllm import VllmEngine
from kdrl_train.rollouts.engines.vllm_server import VllmServerEngine
from kdrl_train.rollouts.sampler import SampleRequest
from kdrl_train.runfolder.log import read_records
from tests.train.test_train import run

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's own warnings

Config = Callable[..., TrainConfig]
START_S = 300.0
WITH_OUR_WORKER = {
    "logprobs-mode": "processed_logprobs",
    "worker-extension-cls": "kdrl_train.rollouts.vllm_worker.Worker",
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "PYTHONPATH": str(Path(__file__).parents[3]),
}
LONG = [20 + i % 50 for i in range(140)]  # more than a block of keys and values, so it is cached
PROMPTS = [[5], [20, 21, 22, 23], LONG]
SAMPLING = SamplingConfig(group_size=4, max_new_tokens=12, temperature=0.8)
REQUEST = SampleRequest(prompts=PROMPTS, sampling=SAMPLING, seed=0, step=0)
K2 = MethodConfig(kd="k2", kd_coef=ScheduleConfig(initial=0.5, final=0.5))
ENDS = {0, *range(200, 230)}


@pytest.fixture(scope="module")
def heads(
    tiny: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Folders of a tied Qwen2 and an untied Llama that vLLM's attention takes, with many ends."""
    root = tmp_path_factory.mktemp("heads")
    for name, family, tied in (("tied", "qwen2", True), ("untied", "llama", False)):
        model = tiny(family, seed=5, hidden=64, tie_word_embeddings=tied)
        model.generation_config.eos_token_id = sorted(ENDS)
        model.generation_config.top_k = 3  # nobody may heed these
        model.generation_config.repetition_penalty = 2.0
        model.generation_config.do_sample = True
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in ("tied", "untied")}


@contextlib.contextmanager
def serving(
    folder: Path, port: int, log: Path, options: Mapping[str, Any] = WITH_OUR_WORKER
) -> Iterator[str]:
    """A stock vLLM server, by default with our worker; its URL."""
    options = {"model": folder, "port": port, "host": "127.0.0.1", "dtype": "float32"} | {
        "max-model-len": 256,
        **options,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | ENVIRONMENT
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            assert process.poll() is None, log.read_text("utf-8")[-3000:]
            assert time.monotonic() < deadline
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def servers(
    heads: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], str]]:
    """servers("tied") -> the URL of its server, started once."""
    from tests.train.servers import free_port  # noqa: PLC0415  it needs fastapi, as vLLM does

    urls: dict[str, str] = {}
    with contextlib.ExitStack() as stack:

        def url(head: str) -> str:
            if head not in urls:
                log = tmp_path_factory.mktemp("server") / "log.txt"
                urls[head] = stack.enter_context(serving(heads[head], free_port(), log))
            return urls[head]

        yield url


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def settings(config: Config, heads: dict[str, Path], servers: Any) -> Config:
    """settings(kind, head="tied", **fields): a run with an engine."""

    def make(kind: str, head: str = "tied", **fields: Any) -> TrainConfig:
        url = servers(head) if kind == "vllm_server" else None
        engine = EngineConfig(kind=kind, url=url)
        base = config(engine=engine, **fields)
        return replace(base, model=replace(base.model, policy=str(heads[head])))

    return make


KEPT: dict[str, Any] = {}  # engines in this process, since each takes seconds to build


@pytest.fixture(params=["vllm-tied", "vllm-untied", "vllm_server-tied", "vllm_server-untied"])
def engine(request: pytest.FixtureRequest, settings: Config) -> tuple[Any, Policy]:
    """An engine that holds the weights of a policy, and the policy."""
    kind, head = request.param.split("-")
    base = settings(kind, head, sampling=SAMPLING)
    policy = load_policy(base, None)
    if request.param not in KEPT:
        tokenizer = load_tokenizer(base.model.policy)
        KEPT[request.param] = open_engine(base, policy, tokenizer, ALONE)
    KEPT[request.param].load(policy, 0)
    return KEPT[request.param], policy


def policy_logprobs(
    policy: Policy, prompt: Tensor, ids: Tensor, temperature: float = 0.8
) -> Tensor:
    """Compute [T] nats by transformers, over the columns that may be drawn."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.cat([prompt, ids])[None]).logits[0]
    logprobs = (logits[:, : policy.sampled_vocab_size] / temperature).log_softmax(dim=1)
    return logprobs[len(prompt) - 1 : -1].gather(1, ids[:, None]).squeeze(1)


def mismatch(rollouts: Rollouts, policy: Policy) -> float:
    """Return the largest difference, in nats, between recorded and policy's log-probabilities."""
    triples = zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprobs, strict=True)
    largest = max(
        (logprobs - policy_logprobs(policy, prompt, ids)).abs().max().item()
        for prompt, ids, logprobs in triples
    )
    print("\nlargest mismatch", largest)
    return largest


def tokens(rollouts: Rollouts) -> list[list[int]]:
    return [ids.tolist() for ids in rollouts.completion_ids]


def test_it_samples_from_the_policy(engine: tuple[Any, Policy]) -> None:
    sampler, policy = engine
    rollouts = sampler.generate(REQUEST)
    assert [ids.tolist() for ids in rollouts.prompt_ids] == [p for p in PROMPTS for _ in range(4)]
    assert mismatch(rollouts, policy) < 1e-4
    assert all(logprobs.dtype == torch.float32 for logprobs in rollouts.logprobs)
    drawn = tokens(rollouts)
    assert all(len({tuple(ids) for ids in drawn[p : p + 4]}) > 1 for p in (0, 4, 8))
    ended = [ids[-1] in ENDS for ids in drawn]
    for ids, cut, end in zip(drawn, rollouts.truncated.tolist(), ended, strict=True):
        assert not set(ids[:-1]) & ENDS
        assert cut == (not end)
        assert not cut or len(ids) == 12
    assert {ids[-1] for ids in drawn} & ENDS - {0}
    assert not all(ended)
    again = sampler.generate(replace(REQUEST, prompts=PROMPTS[1:], first=1))
    assert tokens(again) == drawn[4:]  # a function of the completion, not of the batch
    assert tokens(sampler.generate(replace(REQUEST, step=1))) != drawn
    assert again.texts == rollouts.texts[4:]
    nothing = sampler.generate(replace(REQUEST, prompts=[]))  # a rank without a prompt
    assert nothing.texts == []
    assert nothing.truncated.dtype == torch.bool


def test_ends_that_vllm_does_not_know_of(
    engine: tuple[Any, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, _ = engine
    monkeypatch.setattr(sampler, "stops", sorted(ENDS | set(range(100, 160))))
    rollouts = sampler.generate(REQUEST)
    assert any(100 <= ids[-1] < 160 for ids in tokens(rollouts))
    assert not any(100 <= token < 160 for ids in tokens(rollouts) for token in ids[:-1])


def test_columns_that_a_teacher_lacks_are_not_drawn(
    engine: tuple[Any, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, policy = engine
    policy.sampled_vocab_size = 100
    monkeypatch.setattr(sampler, "allowed", list(range(100)))
    rollouts = sampler.generate(REQUEST)
    assert max(max(ids) for ids in tokens(rollouts)) < 100
    assert mismatch(rollouts, policy) < 1e-4


def test_weights_that_are_pushed_are_sampled_from(engine: tuple[Any, Policy]) -> None:
    sampler, policy = engine
    before = sampler.generate(REQUEST)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.8)
    again = sampler.generate(REQUEST)
    assert tokens(again) == tokens(before)  # the policy moved, its copy did not
    assert mismatch(again, policy) > 0.01
    sampler.load(policy, 1)
    assert sampler.version == 1
    assert mismatch(sampler.generate(REQUEST), policy) < 1e-4


def test_a_poll_that_raises_stops_sampling(engine: tuple[Any, Policy]) -> None:
    sampler, policy = engine
    with pytest.raises(KeyError):
        sampler.generate(REQUEST, {}.popitem)
    assert mismatch(sampler.generate(REQUEST), policy) < 1e-4


@pytest.mark.parametrize("kind", ["vllm", "vllm_server"])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_run(settings: Config, kind: str, head: str) -> None:
    records = run(settings(kind, head))
    print("\nlargest mismatches", [record["sampler_mismatch_max"] for record in records])
    assert [record["step"] for record in records] == [0, 1, 2]
    assert all(record["sampler_mismatch_max"] < 1e-4 for record in records)


def test_a_push_that_is_skipped_stops_the_run(
    settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = VllmEngine.load

    def first_alone(self: VllmEngine, policy: Policy, version: int) -> None:
        if version == 0:
            load(self, policy, version)

    def says_so(self: VllmEngine, policy: Policy, version: int) -> None:
        first_alone(self, policy, version)
        self.version = version

    monkeypatch.setattr(VllmEngine, "load", first_alone)
    with pytest.raises(EngineError, match="rollouts of step 2 must come from the weights after 1"):
        run(settings("vllm", out="skipped"))
    monkeypatch.setattr(VllmEngine, "load", says_so)
    with pytest.raises(
        EngineError, match=r"within engine.max_sampler_mismatch = 0.001 .* of step 2, got"
    ):
        run(settings("vllm", out="forgotten"))


def test_a_stale_tied_head_stops_the_run(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    build = VllmEngine.__init__

    def sabotaged(self: VllmEngine, *arguments: Any, **named: Any) -> None:
        build(self, *arguments, **named)

        def keep_the_head(model: Any) -> None:
            old = model.lm_head.weight.detach().clone()  # as oneDNN's packed copy would
            model.lm_head.cpu_linear = lambda x, _weight, bias: linear(x, old, bias)

        self.llm.apply_model(keep_the_head)

    monkeypatch.setattr(VllmEngine, "__init__", sabotaged)
    base = settings("vllm")
    with pytest.raises(EngineError, match=r"of step 2, got .*a tied LM head that was not loaded"):
        run(base)
    assert [row["step"] for row in read_records(base.out)] == [0]
    assert (base.out / "checkpoints" / "step_000001").is_dir()


def test_a_push_that_the_server_did_not_get_stops_the_run(
    settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = settings("vllm_server")
    policy = load_policy(base, None)
    other = VllmServerEngine(base, policy, load_tokenizer(base.model.policy), ALONE)
    load = VllmServerEngine.load

    def and_another_run_too(self: VllmServerEngine, policy: Policy, version: int) -> None:
        load(self, policy, version)
        if version == 1:
            load(other, policy, version)

    monkeypatch.setattr(VllmServerEngine, "load", and_another_run_too)
    with pytest.raises(EngineError, match=r"this run after 1 steps, got 1 steps, .*: another"):
        run(base)
    assert not list(base.out.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["vllm", "vllm_server"])
def test_two_ranks(settings: Config, tmp_path: Path, kind: str) -> None:
    whole, parts = (settings(kind, out=out, steps=2) for out in ("whole", "parts"))
    save_yaml(parts, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "kdrl_train", "train", "--config", str(tmp_path / "run.yaml")]
    subprocess.run(command, check=True, timeout=2 * START_S)
    for one, two in zip(run(whole), read_records(parts.out), strict=True):
        for key in ("reward", "response_length", "truncated", "loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
        assert two["sampler_mismatch_max"] < 1e-4


def test_a_teacher_on_vllm(
    settings: Config, config: Config, heads: dict[str, Path], servers: Any
) -> None:
    base = settings("vllm_server")
    served = load_policy(base, None)
    VllmServerEngine(base, served, load_tokenizer(base.model.policy), ALONE).load(served, 0)
    url = servers("tied")
    model = ModelConfig(
        policy=str(heads["untied"]), teacher=url, teacher_api="openai", device="cpu"
    )
    client = connect(model, TeacherConfig())
    with contextlib.closing(client):
        for prompt, ids in ((LONG, [50, 0, 7]), ([5], list(range(30, 90)))):
            scores = client.logprobs(Query("one", prompt, ids))
            expected = policy_logprobs(
                served, torch.tensor(prompt), torch.tensor(ids), temperature=1.0
            )
            print("\nlargest difference from the teacher", (scores - expected).abs().max().item())
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    rows = run(config(out="remote", model=model, method=K2, steps=2))
    local = replace(model, teacher=str(heads["tied"]), teacher_api="kdrl")
    for row, other in zip(
        rows, run(config(out="local", model=local, method=K2, steps=2)), strict=True
    ):
        assert row["kl_teacher"] == pytest.approx(other["kl_teacher"], rel=1e-3)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert row["kd_share"] == 1.0
