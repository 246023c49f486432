"""A teacher that vLLM serves without its LM head: states over HTTP, the head from its files."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kdrl_train.batch import Example
from kdrl_train.config import ModelConfig, SamplingConfig, TeacherConfig, TrainConfig
from kdrl_train.exchange import BadReplyError
from kdrl_train.method.config import MethodConfig
from kdrl_train.model.teacher.client import Query, TeacherError, TeacherInfo
from kdrl_train.model.teacher.head import ServedHead, load_head, load_norm, normal_rms
from kdrl_train.model.teacher.identity import check_same_teacher, keep_teacher
from kdrl_train.model.teacher.openai import PoolingClient, connect
from kdrl_train.model.teacher.replies import read_states
from kdrl_train.start import teacher_server
from kdrl_train.start.load import LoadedTeacher
from kdrl_train.start.teacher_server import check_same_tokens, check_states, with_probe
from kdrl_train.tools.evaluate import common_width
from tests.train.conftest import EXACT
from tests.train.pooling_server import PoolingServer
from tests.train.servers import Scripted, by_position, running
from tests.train.test_train_remote import assert_same_run, run

Config = Callable[..., TrainConfig]
QUERY = Query("one", [2, 3], [5, 6, 7], temperature=0.5)
EXAMPLES = [Example(str(i), f"{i}+{i}=", str(2 * i)) for i in range(3)]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_server, "PROBE_TOKENS", 12)


def behind(config: TrainConfig, url: str, folder: Path) -> TrainConfig:
    """Put the teacher of a run behind a URL of vLLM."""
    model = replace(config.model, teacher=url, teacher_api="openai")
    out = config.out.with_name(f"{config.out.name}_remote")
    return replace(config, out=out, model=model, teacher=TeacherConfig(head=str(folder)))


@contextmanager
def connected(server: PoolingServer, dtype: Any = "float32") -> Iterator[PoolingClient]:
    with running(server.app()) as url:
        model = ModelConfig(teacher=url, teacher_api="openai", dtype=dtype)
        client = connect(model, TeacherConfig(), states=True)
        assert isinstance(client, PoolingClient)
        with closing(client):
            yield client


def test_a_run_is_that_of_the_teacher_in_process(config: Config, folders: dict[str, Path]) -> None:
    sampling = SamplingConfig(prompts_per_step=2, group_size=2, max_new_tokens=4, temperature=0.8)
    local = config("local", steps=1, sampling=sampling, method=EXACT)
    server = PoolingServer(folders["teacher"])
    with running(server.app()) as url:
        remote = behind(local, url, folders["teacher"])
        run(remote)
    run(local)
    assert_same_run(remote.out, local.out)
    model = replace(remote.model, policy=str(remote.out / "model"))
    described = json.loads((remote.out / "teacher.json").read_text(encoding="utf-8"))
    assert described["vocab_size"] == 258  # of the head: the server does not say
    wide = SimpleNamespace(get_output_embeddings=lambda: torch.nn.Linear(1, 300))
    assert common_width(wide, model) == 258


@pytest.mark.slow
@pytest.mark.fault("another teacher")
def test_a_resumed_run_finds_its_teacher_in_another_folder(
    config: Config, folders: dict[str, Path], tmp_path: Path
) -> None:
    first = Path(shutil.copytree(folders["teacher"], tmp_path / "first"))
    sampling = SamplingConfig(prompts_per_step=2, group_size=2, max_new_tokens=4)
    with running(PoolingServer(first).app()) as url:
        settings = behind(config("run", steps=1, sampling=sampling, method=EXACT), url, first)
        run(settings)
    moved = first.rename(tmp_path / "moved")
    with running(PoolingServer(moved).app()) as url:
        more = replace(behind(settings, url, moved), out=settings.out, resume=True, steps=2)
        records, said = run(more)
    assert [record["step"] for record in records] == [0, 1]
    assert "cannot be compared" not in said
    tensors = load_file(moved / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1e-4  # its log-probabilities are nearly the same
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    with running(PoolingServer(moved).app()) as url:
        other = replace(behind(more, url, moved), out=settings.out, steps=3)
        with pytest.raises(TeacherError, match=r"files: \w+ in the file, \w+ now"):
            run(other)


def test_states_are_requested_and_read(folders: dict[str, Path]) -> None:
    server = PoolingServer(folders["teacher"])
    with connected(server) as client:
        states, whole = client.states(QUERY), server.before[0][0]
        body = server.sent[-1]
    assert states.shape == (3, 48)
    with torch.no_grad():
        expected = server.model.get_decoder().norm(whole[1:])
    torch.testing.assert_close(states, expected)
    assert (body["input"], body["model"], body["embed_dtype"]) == (
        [2, 3, 5, 6],
        "served",
        "float32",
    )
    assert (client.info.window, client.info.hidden_size) == (256, 48)
    with connected(server, "bfloat16") as client:
        half = client.states(QUERY)
    assert torch.equal(half, expected.bfloat16())


@pytest.mark.fault("sick teacher server")
def test_a_sick_reply_is_refused() -> None:
    good = torch.tensor([[1.0, -2.0], [3.0, 4.0]])

    def read(states: torch.Tensor, cut: int = 8 * 2) -> torch.Tensor:
        data = bytes(states.contiguous().view(torch.uint8).flatten().tolist())[:cut]
        return read_states(data, torch.float32, (2, 2))

    assert torch.equal(read(good), good)
    sick = {
        "15 bytes in place of 16": (good, 15),
        "24 bytes in place of 16": (torch.cat([good, good[:1]]), 99),
        "0 bytes in place of 16": (good, 0),
        "not finite": (torch.tensor([[1.0, torch.nan], [1.0, 1.0]]), 16),
        "length 1, as of embeddings": (torch.tensor([[0.6, -0.8], [1.0, 0.002]]), 16),
    }
    for message, (states, cut) in sick.items():
        with pytest.raises(BadReplyError, match=message):
            read(states, cut)


def test_a_server_of_another_kind_is_told_how_to_start(folders: dict[str, Path]) -> None:
    scripted = Scripted(by_position)  # /v1/completions alone
    with running(scripted.app()) as url:
        model = ModelConfig(teacher=url, teacher_api="openai")
        with pytest.raises(TeacherError, match=r"must give hidden states .* 404.*--runner pooling"):
            connect(model, TeacherConfig(), states=True)
    server = PoolingServer(folders["teacher"])
    server.root = 7
    with pytest.raises(TeacherError, match="got root 7"), connected(server):
        pass


SETTINGS = TrainConfig(method=MethodConfig(kd="rkl"))


def head_of(folder: Path, client: PoolingClient) -> ServedHead:
    return load_head(
        "teacher.head",
        str(folder),
        client.info,
        temperature=1.0,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@pytest.mark.fault("another teacher")
def test_other_weights_are_known_by_what_they_say(
    folders: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    """The server says the same of both: nothing but the states has changed."""
    server = PoolingServer(folders["teacher"])
    with connected(server) as client:
        head = head_of(folders["teacher"], client)

        def probed() -> TeacherInfo:
            return with_probe(SETTINGS, client, head, tokenizer, EXAMPLES)

        first = probed()
        keep_teacher(tmp_path, first)
        (doubt,) = check_same_teacher(tmp_path, probed())
        assert doubt.endswith("of a few prompts differ by 0 nats on average")
        with torch.no_grad():
            server.model.get_decoder().embed_tokens.weight *= -1
        with pytest.raises(TeacherError, match=r"got another one \(its log-prob.* nats on average"):
            check_same_teacher(tmp_path, probed())
    assert first.probe_ids is not None
    ids = first.probe_ids[0]
    logits = AutoModelForCausalLM.from_pretrained(folders["teacher"])(torch.tensor([ids])).logits
    expected = logits[0, :-1].log_softmax(dim=1).gather(1, torch.tensor([ids[1:]]).T)[:, 0]
    assert first.probe_logprobs is not None
    torch.testing.assert_close(torch.tensor(first.probe_logprobs[0]), expected)


def checked(head: Path, tokenizer: Any, server: PoolingServer) -> str:
    """Check the states of a server for the head of a folder."""
    with connected(server) as client:
        served = head_of(head, client)
        assert LoadedTeacher("t", "k", "p", server=client, head=served).vocab_size == 258
        return check_states(SETTINGS, client, served, tokenizer, EXAMPLES)


def test_states_that_fit_are_told_from_others(
    folders: dict[str, Path], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = folders["teacher"]
    flat = shutil.copytree(teacher, tmp_path / "flat")
    tensors = load_file(flat / "model.safetensors")
    tensors["lm_head.weight"].zero_()
    save_file(tensors, flat / "model.safetensors", {"format": "pt"})
    said = checked(flat, tokenizer, PoolingServer(flat))
    assert "258 columns, 0.00 GB on each rank; -5.55 nats per prompt token (uniform" in said
    server = PoolingServer(teacher)
    with pytest.raises(UserWarning, match=r"served, got .*: it predicts prompts worse than a uni"):
        checked(teacher, tokenizer, server)
    for root, said in (("a/b", "a/b;"), (None, "a model that it does not name;")):
        server.root = root
        with pytest.raises(UserWarning, match=f"told for sure: the server has loaded {said} it"):
            checked(teacher, tokenizer, server)
    for kind, message in (
        ("before", r"states that the norm of .* cannot give"),
        ("scaled", "of length 1"),
    ):
        with pytest.raises((ValueError, TeacherError), match=message):
            checked(teacher, tokenizer, PoolingServer(teacher, kind))
    with monkeypatch.context() as small:
        machine = SimpleNamespace(sysconf=lambda _: 1000, environ={})
        small.setattr(teacher_server, "os", machine)
        warned = (
            r"memory of this machine.*; teacher\.head must be .* worse than a uni.*nats per pro"
        )
        with pytest.raises(UserWarning, match=warned):
            checked(teacher, tokenizer, server)
    with pytest.raises(ValueError, match="got 32 numbers in a state, and 48 there"):
        checked(folders["student"], tokenizer, server)
    monkeypatch.setattr(teacher_server, "load_norm", lambda *_: None)
    with pytest.raises(UserWarning, match="told for sure: its final norm is not known"):
        checked(flat, tokenizer, PoolingServer(flat))


def test_tokens_are_compared_by_their_texts(folders: dict[str, Path], tokenizer: Any) -> None:
    server = PoolingServer(folders["teacher"])
    with connected(server) as client:
        assert "of 258 tokens compared, up to id 257: the same" in check_same_tokens(
            client, tokenizer
        )
        server.tokenizer = SimpleNamespace(decode=lambda ids: "?" if ids == [93] else chr(0xFFFD))
        with pytest.raises(ValueError, match=r"token 93 is .*for the policy and '\?'"):
            check_same_tokens(client, tokenizer)
        server.tokenizer = SimpleNamespace(decode=lambda _ids: 7)
        with pytest.raises(TeacherError, match="got prompt 7 when reading /detokenize"):
            check_same_tokens(client, tokenizer)


NORMS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "gemma2": {"query_pre_attn_scalar": 16},  # RMSNorm with 1 + weight
    "phi": {"partial_rotary_factor": 0.5},  # LayerNorm with a bias
    "gpt_neox": {"tie_word_embeddings": False},  # another name in its files
}


@pytest.mark.parametrize("family", NORMS)
def test_what_a_norm_gives_is_told_from_what_it_reads(
    tiny: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    model = tiny(family, **NORMS[family])
    reads: list[torch.Tensor] = []
    for name, module in model.get_decoder().named_children():
        if "norm" in name:
            for parameter in module.parameters():
                torch.nn.init.uniform_(parameter, 0.2, 1.5)
            module.register_forward_pre_hook(lambda _module, args: reads.append(args[0][0]))
    model.save_pretrained(tmp_path)
    norm = load_norm("teacher.head", str(tmp_path))
    assert norm is not None
    ids = torch.randint(258, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model.get_decoder()(input_ids=ids).last_hidden_state[0]
    for dtype, error in ((torch.float32, 1e-3), (torch.bfloat16, 0.01)):
        torch.testing.assert_close(
            normal_rms(norm, states.to(dtype)), torch.ones(9), rtol=0, atol=error
        )
    for others in (reads[0], states / states.norm(dim=1, keepdim=True), states * 1.1):
        assert (normal_rms(norm, others) - 1).abs().max() > 0.09
