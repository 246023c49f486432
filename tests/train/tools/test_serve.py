"""serve: scores are the model's log-probabilities, errors are named, no client waits for ever."""

import math
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import httpx2
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdrl_train import cli, output
from kdrl_train.config import ModelConfig
from kdrl_train.model.fingerprint import weights_hash
from kdrl_train.model.policy import HeadedModel
from kdrl_train.model.teacher.client import vocabulary_hash
from kdrl_train.tools.serve import command
from kdrl_train.tools.serve import scorer as scorer_module
from kdrl_train.tools.serve.app import make
from kdrl_train.tools.serve.command import ServeConfig
from kdrl_train.tools.serve.scorer import Job, Scorer, score_packed
from tests.train.servers import free_port, running, service
from tests.train.tools.test_serve_requests import send

DEADLINE_S = 60.0
SIZES = [(3, 4), (1, 9), (7, 1), (20, 30)]


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> command.ServedTeacher:
    return service(folders["teacher"], queue_size=64)


def request(
    served: command.ServedTeacher, method: str, path: str, body: Any = None
) -> httpx2.Response:
    """Sends one request, without a network; a text is sent as it is."""
    if isinstance(body, str):
        headers = {"content-type": "application/json"}
        return send(make(served), method, path, content=body, headers=headers)
    return send(make(served), method, path, json=body)


def sequences(draw: torch.Generator, vocab_size: int = 258) -> list[dict[str, Any]]:
    return [
        {"ids": torch.randint(vocab_size, (p + c,), generator=draw).tolist(), "prompt_tokens": p}
        for p, c in SIZES
    ]


def expected(model: Any, ids: list[int], prompt_tokens: int, temperature: float, V: int) -> Tensor:
    """Computes log-probabilities from the model's logits, one sequence at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, prompt_tokens - 1 : -1, :V]
    chosen = torch.tensor(ids[prompt_tokens:])[:, None]
    return (logits / temperature).log_softmax(dim=1).gather(1, chosen).squeeze(1)


@pytest.mark.fault("attack on serve")
def test_a_client_that_has_left_costs_no_pass(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holds the model with a first request, drops a second one, and answers a third."""
    served = service(folders["teacher"], queue_size=64)
    scorer, go, scored, accepted = served.scorer, threading.Event(), [], []
    compute, submit = scorer_module.score_packed, scorer.submit

    def compute_later(model: HeadedModel, jobs: list[Job]) -> list[Tensor]:
        assert go.wait(DEADLINE_S)
        scored.extend(len(job.completion_ids) for job in jobs)
        return compute(model, jobs)

    def remember(jobs: list[Job]) -> bool:
        accepted.extend(jobs)
        return submit(jobs)

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(scorer_module, "score_packed", compute_later)
    monkeypatch.setattr(scorer, "submit", remember)
    short = httpx2.Timeout(DEADLINE_S, read=0.5)
    bodies = [{"sequences": [{"ids": [3] * n, "prompt_tokens": 1}]} for n in (3, 4, 5)]
    with running(make(served)) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(httpx2.post, f"{url}/score", json=bodies[0], timeout=DEADLINE_S)
        wait_for(lambda: len(accepted) == 1 and accepted[0].result.running())
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{url}/score", json=bodies[1], timeout=short)
        wait_for(lambda: len(accepted) == 2 and accepted[1].result.cancelled())
        third = pool.submit(httpx2.post, f"{url}/score", json=bodies[2], timeout=DEADLINE_S)
        wait_for(lambda: len(accepted) == 3)
        go.set()
        replies = [post.result().json()["logprobs"][0] for post in (first, third)]
    assert [len(logprobs) for logprobs in replies] == [2, 4]
    assert scored == [2, 4]


@pytest.mark.parametrize(("temperature", "vocab_size"), [(1.0, None), (0.7, None), (1.3, 200)])
def test_scores_are_those_of_the_models_own_logits(
    loaded: command.ServedTeacher,
    folders: dict[str, Path],
    temperature: float,
    vocab_size: int | None,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["teacher"])
    sent = sequences(torch.Generator().manual_seed(0), vocab_size or 258)
    body = {"sequences": sent, "temperature": temperature, "vocab_size": vocab_size}
    reply = request(loaded, "POST", "/score", body).json()
    assert reply["fingerprint"] == loaded.info["fingerprint"]
    assert len(reply["logprobs"]) == len(sent)
    for sequence, logprobs in zip(sent, reply["logprobs"], strict=True):
        exact = expected(model, **sequence, temperature=temperature, V=vocab_size or 258)
        torch.testing.assert_close(torch.tensor(logprobs), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
        ("granite", {"logits_scaling": 4.0}),
        ("phi", {"partial_rotary_factor": 0.5}),
    ],
)
def test_caps_scales_and_biases_are_the_models(
    tiny: Callable[..., Any], family: str, config: dict[str, Any]
) -> None:
    model, temperatures = tiny(family, **config), [0.5, 1.0, 2.0]
    ids = torch.randint(258, (3, 12), generator=torch.Generator().manual_seed(0))
    jobs = [Job(i[:5], i[5:], t, 258) for i, t in zip(ids, temperatures, strict=True)]
    scores = score_packed(HeadedModel(model), jobs)
    for sequence, t, logprobs in zip(ids.tolist(), temperatures, scores, strict=True):
        exact = expected(model, sequence, 5, t, 258)
        torch.testing.assert_close(logprobs, exact, rtol=1e-5, atol=1e-5)


def test_version_says_what_must_match(
    loaded: command.ServedTeacher, folders: dict[str, Path], tokenizer: Any
) -> None:
    info = request(loaded, "GET", "/version").json()
    packages = info.pop("packages")
    assert packages["torch"] == torch.__version__
    assert set(packages) == {"kdrl-kernels", "torch", "transformers"}
    assert info.pop("fingerprint")
    assert info == {
        "model": str(folders["teacher"]),
        "vocab_size": 258,
        "window": 256,
        "dtype": "float32",
        "tokenizer": vocabulary_hash(tokenizer),
        "eos_ids": [0],
        "weights": weights_hash(str(folders["teacher"])),
        "chat_template": None,
        "hidden_size": 48,
        "logit_scale": 1.0,
        "softcap": None,
    }


@pytest.mark.fault("another teacher")
def test_another_model_has_another_fingerprint(
    loaded: command.ServedTeacher, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = service(folders["other_teacher"]).info
    assert other["tokenizer"] == loaded.info["tokenizer"]
    assert other["fingerprint"] != loaded.info["fingerprint"]
    assert service(folders["teacher"]).info == loaded.info
    copy = service(shutil.copytree(folders["teacher"], tmp_path / "copy"))
    assert copy.info["fingerprint"] == loaded.info["fingerprint"]
    assert copy.info["model"] != loaded.info["model"]


def test_until_the_model_is_loaded_the_server_says_so(loaded: command.ServedTeacher) -> None:
    empty = command.ServedTeacher()
    health = request(empty, "GET", "/health")
    assert (health.status_code, health.json()) == (503, {"status": "loading"})
    for method, path, body in (("GET", "/version", None), ("POST", "/score", {"sequences": []})):
        reply = request(empty, method, path, body)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
        assert reply.json() == {"detail": "the model is loading"}
    health = request(loaded, "GET", "/health")
    assert (health.status_code, health.json()) == (200, {"status": "ready"})


GOOD = {"ids": [5, 6, 7], "prompt_tokens": 2}


@pytest.mark.fault("attack on serve")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"sequences": [GOOD, GOOD | {"ids": [5, 258, 7]}]}, r"sequences.1.ids.1 must be in [0, 2"),
        ({"sequences": [GOOD | {"ids": [5, -1, 7]}]}, "sequences.0.ids.1 must be in [0, 258), got"),
        (
            {"sequences": [GOOD], "vocab_size": 7},
            "sequences.0.ids.2 must be in [0, 7), got 7",
        ),
        ({"sequences": [GOOD], "vocab_size": 259}, "vocab_size must be in [1, 258], got 259"),
        ({"sequences": [GOOD], "vocab_size": 0}, "vocab_size must be in [1, 258], got 0"),
        (
            {"sequences": [GOOD | {"prompt_tokens": 3}]},
            "sequences.0.prompt_tokens must leave a prompt and a completion of the 3 tokens, got 3",
        ),
        ({"sequences": [GOOD | {"prompt_tokens": 0}]}, "a completion of the 3 tokens, got 0"),
        (
            {"sequences": [GOOD | {"ids": [5] * 257}]},
            "sequences.0.ids must fit the model's window of 256 tokens, got 257",
        ),
        ({"sequences": [GOOD] * 65}, "sequences must hold 1 to 64 sequences, got 65"),
        ({"sequences": []}, "sequences must hold 1 to 64 sequences, got 0"),
        ({"sequences": [GOOD], "temperature": 0.0}, "temperature must be positive and finite"),
        ({"sequences": [GOOD], "temperature": 1e-320}, "temperature must be positive and finite"),
        ({"sequences": [GOOD], "temperature": 1e39}, "temperature must be positive and finite"),
        ({"sequences": [GOOD], "temperatur": 1.0}, "temperatur: Extra inputs are not permitted"),
        ({"sequences": [GOOD | {"ids": [5, "6", 7]}]}, "sequences.0.ids.1: Input should be a vali"),
        ({"sequences": [{"ids": [5, 6]}]}, "sequences.0.prompt_tokens: Field required"),
        ('{"sequences": [{"ids": [1, 2], "prompt_tokens": 1}], "temperature": NaN}', "temperature"),
        ("{", "the body: Invalid JSON: EOF while parsing an object"),
    ],
)
def test_a_wrong_request_is_named(loaded: command.ServedTeacher, body: Any, message: str) -> None:
    reply = request(loaded, "POST", "/score", body)
    assert reply.status_code == 422
    assert message in reply.json()["detail"]


def test_a_token_of_probability_0_is_an_error(
    loaded: command.ServedTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(_model: HeadedModel, jobs: list[Job]) -> list[Tensor]:
        return [torch.tensor([-1.0, -math.inf]) for _ in jobs]

    monkeypatch.setattr(scorer_module, "score_packed", score)
    body = {"sequences": [GOOD | {"prompt_tokens": 1}]}
    reply = request(loaded, "POST", "/score", body)
    assert reply.status_code == 422
    assert "sequences.0 must have finite log-probabilities, got -inf for token 1" in reply.text


def test_a_failure_reaches_its_client_and_the_server_goes_on(
    loaded: command.ServedTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_model: HeadedModel, _jobs: list[Job]) -> list[Tensor]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scorer_module, "score_packed", fail)
    reply = request(loaded, "POST", "/score", {"sequences": [GOOD, GOOD]})
    assert (reply.status_code, reply.json()) == (500, {"detail": "RuntimeError: out of memory"})
    monkeypatch.undo()
    assert request(loaded, "POST", "/score", {"sequences": [GOOD]}).status_code == 200


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[list[Job]]]:
    """Makes the model wait for an event; returns the event and the batches that it gets."""
    gate, batches = threading.Event(), []

    def score(_model: HeadedModel, jobs: list[Job]) -> list[Tensor]:
        batches.append(jobs)
        assert gate.wait(30)
        return [-job.completion_ids.float() for job in jobs]

    monkeypatch.setattr(scorer_module, "score_packed", score)
    return gate, batches


def job(tokens: int, mark: int, vocab_size: int = 258) -> Job:
    return Job(torch.ones(tokens, dtype=torch.int64), torch.tensor([mark]), 1.0, vocab_size)


def test_batches_keep_the_order_and_the_token_budget(
    gated: tuple[threading.Event, list[list[Job]]], tiny: Callable[..., Any]
) -> None:
    gate, batches = gated
    scorer = Scorer(HeadedModel(tiny("llama")), batch_tokens=10, queue_size=100)
    first = job(1, 0)
    assert scorer.submit([first])
    while not batches:  # the model has the first job while the others come
        pass
    lengths = [4, 6, 1, 12, 3, 3, 2, 1]
    jobs = [job(n, i + 1, 200 if i == 7 else 258) for i, n in enumerate(lengths)]
    assert scorer.submit(jobs[:3])  # of one client
    assert scorer.submit(jobs[3:])  # and of another
    gate.set()
    for mark, one in enumerate([first, *jobs]):
        assert one.result.result(30).tolist() == [-mark]
    expected_tokens = [[1], [4, 6], [1], [12], [3, 3, 2], [1]]
    assert [[j.tokens for j in batch] for batch in batches] == expected_tokens


@pytest.mark.fault("attack on serve")
def test_a_full_queue_refuses_requests(
    gated: tuple[threading.Event, list[list[Job]]], loaded: command.ServedTeacher
) -> None:
    gate, batches = gated
    small = command.ServedTeacher(Scorer(loaded.scorer.model, 10, queue_size=2), loaded.info)
    assert small.scorer.submit([job(1, 0)])
    while not batches:
        pass
    assert small.scorer.submit([job(1, 1)])
    reply = request(small, "POST", "/score", {"sequences": [GOOD, GOOD]})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json() == {"detail": "too many sequences wait"}
    gate.set()
    assert request(small, "POST", "/score", {"sequences": [GOOD]}).json()["logprobs"] == [[-7.0]]


def test_a_model_that_mixes_sequences_gets_one_a_pass(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leaks(_model: HeadedModel, name: str, *, packed: bool = True) -> float:
        if packed:
            raise ValueError(f"{name} must keep packed sequences apart")
        return 0.0

    monkeypatch.setattr(command, "probe", leaks)
    assert service(folders["teacher"]).scorer.batch_tokens == 1
    assert (
        "one sequence in each forward pass: model.teacher must keep packed"
        in capsys.readouterr().out
    )


def test_nothing_is_shown_while_it_waits_for_requests(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with output.shown("serve"):
        service(folders["teacher"])
        assert output._shown is not None
        assert output._shown.stage == ""
    assert f"serve: loading {folders['teacher']} (" in capsys.readouterr().err


@pytest.mark.parametrize("teacher", [None, "http://127.0.0.1:1", "self"])
def test_there_must_be_a_model_to_serve(teacher: str | None) -> None:
    with pytest.raises(ValueError, match=r"model\.teacher must name a folder or hub id to serve"):
        command.main(ServeConfig(model=ModelConfig(teacher=teacher)))


@pytest.mark.parametrize("key", ["weights", "offload_policy", "offload_teacher"])
def test_what_serving_ignores_is_refused(folders: dict[str, Path], key: str) -> None:
    value = Path("runs/first/checkpoints/step_000050") if key == "weights" else True
    model = ModelConfig(teacher=str(folders["teacher"]), **{key: value})
    with pytest.raises(ValueError, match=rf"model\.{key} must not be set to serve, got "):
        command.main(ServeConfig(model=model))


def test_a_model_that_cannot_be_loaded_ends_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model.teacher", "/no/such", "--model.device", "cpu", "--port", str(free_port()))
    assert cli.main(["serve", *options]) == 1
    assert "model.teacher must be a folder with a causal LM" in capsys.readouterr().err


def test_without_fastapi_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(command.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"got No module named 'uvicorn': pip install 'kdrl-kern"):
        command.main(ServeConfig(model=ModelConfig(teacher="somewhere")))
