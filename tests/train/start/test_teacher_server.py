"""teacher_server: `check` refuses a teacher behind a URL that does not fit the policy."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from transformers import AutoTokenizer

from kdrl_train import cli
from kdrl_train.config import ModelConfig, TeacherConfig
from kdrl_train.model.load import load_model
from kdrl_train.model.teacher.client import vocabulary_hash
from kdrl_train.model.teacher.openai import connect
from kdrl_train.start import teacher_server
from kdrl_train.tools.evaluate import common_width
from tests.train.servers import Scripted, by_position, free_port, running, status, teacher_app


@pytest.fixture
def server(tokenizer: Any) -> Iterator[tuple[Scripted, str]]:
    """Start a server that fits the student; yields it and its URL."""
    made = Scripted(by_position, tokenizer=vocabulary_hash(tokenizer))
    made.text = lambda token: tokenizer.decode([token])
    with running(made.app()) as url:
        yield made, url


def checked(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], url: str, **changes: str
) -> tuple[int, str]:
    """Run `check`; returns its exit code and its table."""
    values = {
        "model.policy": str(folders["student"]),
        "model.teacher": url,
        "data.path": str(folders["task"]),
        "model.device": "cpu",
        "reward.workers": "1",
        "sampling.max-new-tokens": "32",
    } | {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    code = cli.main(["check", *(str(p) for k, v in values.items() for p in (f"--{k}", v))])
    return code, " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_served_teacher_that_fits_passes(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with running(teacher_app(folders["teacher"])) as url:
        code, text = checked(folders, capsys, url)
    assert code == 0
    assert "failed" not in text
    for words in (
        "the same 258 tokens",
        "float32, 258 columns, a window of 256",
        "nats per prompt",
    ):
        assert words in text, text


@pytest.mark.fault("secrets")
def test_a_teacher_across_a_public_network_is_warned_of(
    server: tuple[Scripted, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_server, "is_exposed", lambda _url: True)
    with closing(connect(ModelConfig(teacher=server[1]), TeacherConfig())) as client:
        with pytest.raises(UserWarning, match=r"model\.teacher should be https, .* got http"):
            teacher_server.check_server(client)
        monkeypatch.undo()
        assert teacher_server.check_server(client).startswith(server[1])


@pytest.mark.parametrize("template", [None, "Q {{ messages[0]['content'] }}"])
def test_another_template_of_a_served_teacher_is_shown(
    folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    template: str | None,
) -> None:
    shutil.copytree(folders["teacher"], tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "teacher")
    with running(teacher_app(tmp_path / "teacher")) as url:
        code, text = checked(folders, capsys, url)
    assert code == 0
    if template is None:
        assert "tokenizers ok the same 258 tokens teacher" in text
    else:
        shown = "tokenizers warning the teacher's tokenizer renders a prompt as 'Q 0+0='"
        assert shown in text, text


def test_an_openai_server_that_fits_passes(
    folders: dict[str, Path], server: tuple[Scripted, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = checked(folders, capsys, server[1], model__teacher_api="openai")
    assert code == 0
    assert "of 258 tokens compared, up to id 257: the same; its chat template is not" in text
    assert "the teacher's are not known: its server does not say" in text
    assert "258 tokens; columns: policy 258 " in text
    assert "are not sampled" not in text  # no column is left out


MISFITS = {
    "another tokenizer": (
        {"tokenizer": "other"},
        ("tokenizers failed the teacher at", "must have the policy's tokenizer, got another map"),
    ),
    "other ends": (
        {"eos_ids": [0, 7]},
        (
            "end of sequence failed the teacher must end sequences as the policy does, got [7]",
            "or set method.kd_eos to mask",
        ),
    ),
    "a short window": (
        {"window": 35},
        ("prompts failed model.teacher must hold the longest prompt", "35 tokens for 4 + 32"),
    ),
    "too few columns": (
        {"vocab_size": 250},
        ("vocabulary failed model.teacher must have a column for every token, got 250 columns",),
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_model_that_does_not_fit_fails_the_check(
    folders: dict[str, Path],
    server: tuple[Scripted, str],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    info, messages = MISFITS[name]
    scripted, url = server
    scripted.info |= info
    code, text = checked(folders, capsys, url)
    assert code == 1
    for message in messages:
        assert message in text, text


def test_other_ends_pass_where_they_are_masked(
    folders: dict[str, Path], server: tuple[Scripted, str], capsys: pytest.CaptureFixture[str]
) -> None:
    scripted, url = server
    scripted.info["eos_ids"] = [0, 7]
    code, text = checked(folders, capsys, url, method__kd_eos="mask")
    assert code == 0
    assert "the teacher also ends with [7], so ends are not distilled" in text


SILENT = {
    "busy": (lambda _ids, _n: status(503, "later"), "kdrl", "got status 503 (later) for prompt"),
    "not a number": (lambda ids, n: [-9999.0] * (len(ids) - n), "kdrl", "must give a finite log-"),
    "no prompt log-probabilities": (
        lambda _ids, _n: status(200, '{"choices": [{"prompt_logprobs": null}]}'),
        "openai",
        "must return prompt log-probabilities",
    ),
    "refused": (lambda _ids, _n: status(400, "too long"), "openai", "status 400: too long"),
}


@pytest.mark.parametrize("name", SILENT)
def test_a_server_without_scores_fails_the_check(
    folders: dict[str, Path],
    server: tuple[Scripted, str],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    scripted, url = server
    scripted.score, api, message = SILENT[name]
    code, text = checked(folders, capsys, url, model__teacher_api=api)
    assert code == 1
    assert "teacher probe failed" in text
    assert message in text, text


def test_tokens_are_compared_by_their_texts_where_there_is_no_hash(
    folders: dict[str, Path],
    server: tuple[Scripted, str],
    capsys: pytest.CaptureFixture[str],
    tokenizer: Any,
) -> None:
    scripted, url = server
    scripted.text = lambda token: "?" if token == 50 else tokenizer.decode([token])
    code, text = checked(folders, capsys, url, model__teacher_api="openai")
    assert code == 1
    assert f"token 50 is {tokenizer.decode([50])!r} for the policy and '?' for the teacher" in text
    scripted.text = lambda _token: None
    code, text = checked(folders, capsys, url, model__teacher_api="openai")
    assert code == 0
    assert "0 of 258 tokens compared" in text


def test_a_server_that_is_not_there_fails_the_check(
    folders: dict[str, Path], server: tuple[Scripted, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = checked(folders, capsys, f"http://127.0.0.1:{free_port()}")
    assert code == 1
    assert "teacher server failed model.teacher must reply, got ConnectError" in text
    assert "start it with `python -m kdrl_train serve`" in text
    server[0].models.append({"id": "another"})
    code, text = checked(folders, capsys, server[1], model__teacher_api="openai")
    assert code == 1
    assert "teacher.name must be a model of" in text


def test_without_distillation_no_server_is_queried(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, file = f"http://127.0.0.1:{free_port()}", tmp_path / "run.yaml"
    file.write_text(f"model: {{teacher: '{url}'}}\n", encoding="utf-8")
    code, text = checked(folders, capsys, url, preset="grpo", config=file)
    assert code == 0
    assert f"nothing reads model.teacher = {url}" in text
    assert "teacher server" not in text


def test_evaluation_samples_from_the_columns_that_both_have(
    folders: dict[str, Path], server: tuple[Scripted, str]
) -> None:
    scripted, url = server
    config = ModelConfig(policy=str(folders["student"]), teacher=url, device="cpu")
    policy = load_model(config.policy, "model.policy", config, torch.float32)
    scripted.info["vocab_size"] = 250
    assert common_width(policy, config) == 250
    assert common_width(policy, replace(config, teacher_api="openai")) == 258
