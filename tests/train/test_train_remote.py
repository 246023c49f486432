"""train with a teacher behind a URL: the same step, the pauses, and no call that is not needed."""

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdrl_train import cli, train, waiting
from kdrl_train.batch import Verdicts
from kdrl_train.config import EngineConfig, LogConfig, SamplingConfig, TeacherConfig, TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.model.teacher import remote
from kdrl_train.model.teacher.client import TeacherError, vocabulary_hash
from kdrl_train.model.teacher.remote import RemoteTeacher
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder.log import read_records
from tests.train.model.test_teacher_replies import drips
from tests.train.servers import (
    Process,
    Scripted,
    by_position,
    free_port,
    running,
    status,
    teacher_app,
)
from tests.train.test_two_ranks import assert_same_metrics, together

K2 = MethodConfig(kd="k2", kd_coef=ScheduleConfig(initial=0.5, final=0.5))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LONGEST_WAIT_S", 0.3)
    monkeypatch.setattr(remote, "QUIET_S", 0.2)


@pytest.fixture
def config(config: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """config(out, folder or URL of the teacher, reward="early_bytes", **fields)."""

    def make(out: str, teacher: str, reward: str = "early_bytes", **fields: Any) -> TrainConfig:
        made = config(out, reward=reward, **({"method": K2} | fields))
        return replace(made, model=replace(made.model, teacher=teacher))

    return make


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[str]:
    """Serve the teacher in a thread, which starts at once; the URL."""
    with running(teacher_app(folders["teacher"])) as url:
        yield url


def run(config: TrainConfig) -> tuple[list[dict[str, Any]], str]:
    """Run; returns the records of metrics.jsonl, and what the console said."""
    text = io.StringIO()
    train.main(config, Console(file=text, width=200))
    return read_records(config.out), text.getvalue()


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Compare losses, gradients and models to 1e-5: a server packs other sequences together."""
    pairs = zip(read_records(ours), read_records(theirs), strict=True)
    for mine, other in pairs:
        for key in ("step", "reward", "response_length", "kd_share", "verifier_right"):
            assert mine[key] == other[key], key
        for key in ("loss", "grad_norm", "kl_teacher", "k2", "entropy"):
            assert mine[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), key
    expected = weights(theirs)
    for name, tensor in weights(ours).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("mask", ["none", "wrong"])
def test_a_step_is_that_of_the_teacher_in_process(
    config: Callable[..., TrainConfig],
    folders: dict[str, Path],
    served: str,
    mask: str,
    temperature: float,
) -> None:
    sampling = replace(config("", "").sampling, temperature=temperature)
    settings = {"method": replace(K2, kd_mask=mask), "sampling": sampling, "steps": 1}
    remote = config("remote", served, **settings)
    local = config("local", str(folders["teacher"]), **settings)
    records, _ = run(remote)
    run(local)
    assert_same_run(remote.out, local.out)
    assert records[0]["seconds_teacher"] > 0
    assert (records[0]["kd_share"] == 1.0) == (mask == "none")


@pytest.mark.parametrize("mask", ["none", pytest.param("wrong", marks=pytest.mark.slow)])
def test_a_server_reads_the_teachers_prompt(
    config: Callable[..., TrainConfig], folders: dict[str, Path], served: str, mask: str
) -> None:
    """While the rewards are computed (none), and after them (wrong)."""
    data = replace(config("", "").data, teacher_template="{answer}!{prompt}")
    settings = {"method": replace(K2, kd_mask=mask), "data": data, "steps": 1}
    remote = config("remote", served, **settings)
    local = config("local", str(folders["teacher"]), **settings)
    records, _ = run(remote)
    run(local)
    assert_same_run(remote.out, local.out)
    plain, _ = run(replace(config("plain", served, **settings), data=config("", "").data))
    assert plain[0]["kl_teacher"] != pytest.approx(records[0]["kl_teacher"], rel=1e-3)


@pytest.mark.parametrize("kind", ["constant", "kl_budget"])  # known early, and not
def test_a_prefetching_run_is_that_of_the_teacher_in_process(
    config: Callable[..., TrainConfig], folders: dict[str, Path], kind: Any
) -> None:
    method = replace(K2, kd_coef=replace(K2.kd_coef, kind=kind, target_kl=2.0, bounds=(0.1, 0.9)))
    settings = {"method": method, "engine": EngineConfig(staleness=1)}
    with running(teacher_app(folders["teacher"])) as url:
        remote, local = config("remote", url, **settings), config("local", "", **settings)
        local = replace(local, model=replace(local.model, teacher=str(folders["teacher"])))
        run(remote)
        run(local)
    assert_same_run(remote.out, local.out)


def on_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Call `action` once, before the completions of a step are drawn."""
    collect, done = train.collect, []

    def wrapped(run: train.Run, now: int, stages: train.Stages) -> Any:
        if now == step and not done:
            done.append(now)
            action()
        return collect(run, now, stages)

    monkeypatch.setattr(train, "collect", wrapped)


@pytest.mark.slow
def test_a_killed_teacher_pauses_the_run_until_it_is_back(
    config: Callable[..., TrainConfig],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = teacher_app(folders["teacher"])  # the same model, in a server that starts at once
    local = config("local", str(folders["teacher"]))
    run(local)
    with Process(folders["teacher"]) as process, ExitStack() as other:
        assert set(process.wait_until_ready()) == {"loading", "ready"}

        def kill_and_start_another() -> None:
            process.kill()
            start = partial(other.enter_context, running(app, process.port))
            threading.Timer(1.0, start).start()

        on_step(monkeypatch, 1, kill_and_start_another)
        remote = config("remote", process.url)
        _, said = run(remote)
    assert f"the teacher at {process.url} does not reply, ConnectError" in said
    assert f"the teacher at {process.url} is back after" in said
    assert_same_run(remote.out, local.out)


@pytest.mark.slow
def test_past_the_deadline_a_checkpoint_is_left_to_resume_from(
    config: Callable[..., TrainConfig],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    local = config("local", str(folders["teacher"]))
    run(local)
    app, port = teacher_app(folders["teacher"]), free_port()
    remote = replace(
        config("remote", f"http://127.0.0.1:{port}"), teacher=TeacherConfig(deadline_s=3.0)
    )
    file = tmp_path / "run.yaml"
    save_yaml(remote, file)
    with ExitStack() as server, monkeypatch.context() as patch:
        server.enter_context(running(app, port))
        on_step(patch, 2, server.close)
        assert cli.main(["train", "--config", str(file)]) == 1
    assert "must reply within teacher.deadline_s = 3 s" in capsys.readouterr().err
    assert {p.name for p in (remote.out / "checkpoints").iterdir()} == {"LATEST", "step_000002"}
    assert len(read_records(remote.out)) == 2
    with running(app, port):
        assert cli.main(["train", "--config", str(file), "--resume"]) == 0
    assert_same_run(remote.out, local.out)


@pytest.fixture
def scripted(tokenizer: Any) -> Iterator[tuple[Scripted, str]]:
    """Start a server that records its queries; yields it and its URL."""
    server = Scripted(by_position, tokenizer=vocabulary_hash(tokenizer))
    with running(server.app()) as url:
        yield server, url


def training_calls(server: Scripted) -> int:
    """Count the queries of training; those of the preflight have a prompt of one token."""
    return sum(body["sequences"][0]["prompt_tokens"] > 1 for body in server.bodies)


NO_CALL = {
    "right completions are masked": (replace(K2, kd_mask="wrong"), "always_right"),
    "right groups are masked": (replace(K2, kd_mask="wrong_group"), "always_right"),
    "beta is 0": (replace(K2, kd_coef=ScheduleConfig(initial=0.0, final=0.0)), "early_bytes"),
}


@pytest.mark.parametrize("name", NO_CALL)
def test_nothing_to_distil_costs_no_call(
    config: Callable[..., TrainConfig], scripted: tuple[Scripted, str], name: str
) -> None:
    method, reward = NO_CALL[name]
    server, url = scripted
    records, _ = run(config("run", url, reward, method=method, steps=1))
    assert records[0]["kd_share"] == 0.0
    assert training_calls(server) == 0


def test_a_masked_completion_costs_no_call(
    config: Callable[..., TrainConfig], scripted: tuple[Scripted, str]
) -> None:
    server, url = scripted
    records, _ = run(config("run", url, method=replace(K2, kd_mask="wrong"), steps=2))
    wrong = sum(record["verifier_wrong"] for record in records)
    assert 0 < wrong < 32
    assert training_calls(server) == wrong


def test_the_teacher_scores_while_rewards_are_made(
    config: Callable[..., TrainConfig],
    scripted: tuple[Scripted, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, url = scripted
    before: list[int] = []
    judge = Verifier.score

    def wait_for_the_teacher(
        self: Verifier, texts: list[str], *arguments: Any, **more: Any
    ) -> Verdicts:
        deadline = time.monotonic() + 5
        while len(texts) == 16 and training_calls(server) < 16 and time.monotonic() < deadline:
            time.sleep(0.01)
        before.append(training_calls(server))
        return judge(self, texts, *arguments, **more)

    monkeypatch.setattr(Verifier, "score", wait_for_the_teacher)
    run(config("run", url, steps=1))
    assert before[-1] == 16  # all replies came before the first reward
    assert training_calls(server) == 16


@pytest.mark.slow
@pytest.mark.fault("stopped by a signal")
def test_a_signal_does_not_wait_for_a_dripping_teacher(
    config: Callable[..., TrainConfig], scripted: tuple[Scripted, str]
) -> None:
    server, url = scripted
    times: list[float] = []

    def drips_from_the_second_step(ids: list[int], prompt_tokens: int) -> Any:
        if training_calls(server) <= 16:
            return by_position(ids, prompt_tokens)
        if not times:
            times.append(time.monotonic())
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return drips(ids, prompt_tokens)

    server.score = drips_from_the_second_step
    settings = config("run", url)
    _, said = run(settings)
    assert time.monotonic() - times[0] < 4  # with a checkpoint, on a busy machine
    assert "stopped by a signal (SIGTERM) after 1 steps" in said
    assert (settings.out / "checkpoints" / "step_000001").is_dir()


@pytest.mark.slow
@pytest.mark.fault("sick teacher server")
@pytest.mark.parametrize("reply", ["<html>", "[" * 100_000, '{"logprobs": [[null]]}'])
def test_a_sick_reply_loses_no_finished_step(
    config: Callable[..., TrainConfig], scripted: tuple[Scripted, str], reply: str
) -> None:
    server, url = scripted
    server.score = lambda ids, n: (
        status(200, reply) if training_calls(server) > 16 else by_position(ids, n)
    )
    settings = config("run", url)
    with pytest.raises(TeacherError, match=f"the teacher at {url} must reply"):
        run(settings)
    assert (settings.out / "checkpoints" / "step_000001").is_dir()


@pytest.mark.slow
def test_ends_are_not_distilled_where_they_are_masked(
    config: Callable[..., TrainConfig], scripted: tuple[Scripted, str]
) -> None:
    server, url = scripted
    server.info["eos_ids"] = [0, 7]
    sampling = SamplingConfig(prompts_per_step=8, group_size=16, max_new_tokens=16)
    settings = {"sampling": sampling, "steps": 1}
    with pytest.raises(ValueError, match=r"the teacher must end .* got \[7\] .*kd_eos to mask"):
        run(config("kept", url, **settings))
    records, _ = run(config("masked", url, method=replace(K2, kd_eos="mask"), **settings))
    ended = 128 * (1 - records[0]["truncated"])
    tokens = 128 * records[0]["response_length"]
    assert ended > 0
    assert records[0]["kd_share"] == pytest.approx((tokens - ended) / tokens)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["none", "wrong"])
def test_two_ranks_query_their_shares(
    config: Callable[..., TrainConfig], served: str, mask: str
) -> None:
    settings = {"method": replace(K2, kd_mask=mask), "steps": 2}
    whole, parts = (config(out, served, **settings) for out in ("whole", "parts"))
    run(whole)
    assert_same_metrics(together(parts, 2), read_records(whole.out))


@pytest.mark.slow
def test_gradients_are_told_apart_with_a_server(
    config: Callable[..., TrainConfig], folders: dict[str, Path], served: str
) -> None:
    settings = {"method": K2, "steps": 1, "log": LogConfig(diagnostics_every=1)}
    (record,), _ = run(config("remote", served, **settings))
    (local,), _ = run(config("local", str(folders["teacher"]), **settings))
    for name in ("rl_grad_norm", "kd_grad_norm", "rl_kd_cosine"):
        assert record[name] == pytest.approx(local[name], rel=1e-4)


def test_a_signal_does_not_wait_for_a_teacher_that_is_away(
    config: Callable[..., TrainConfig], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(teacher_app(folders["teacher"])) as url:
        settings = config("remote", url, method=K2, steps=3)
        query = RemoteTeacher.query
        kill = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))

        def away(self: Any, *arguments: Any) -> Any:
            self.client._exchange._http.base_url = f"http://127.0.0.1:{free_port()}"  # no server
            if kill.ident is None:  # a second signal would hit the next test
                kill.start()
            return query(self, *arguments)

        monkeypatch.setattr(RemoteTeacher, "query", away)
        start = time.monotonic()
        records, words = run(settings)
    assert time.monotonic() - start < 15
    assert records == []
    assert "stopped by a signal (SIGTERM) after 0 steps" in words


@pytest.mark.fault("another teacher")
def test_a_resumed_run_finds_its_teacher_elsewhere_but_no_other(
    config: Callable[..., TrainConfig], folders: dict[str, Path]
) -> None:
    with running(teacher_app(folders["teacher"])) as url:
        whole, parts = config("whole", url), config("parts", url, steps=1)
        expected, _ = run(whole)
        run(parts)
    with running(teacher_app(folders["other_teacher"])) as url:
        other = replace(parts, resume=True, steps=3, model=replace(parts.model, teacher=url))
        with pytest.raises(
            TeacherError, match=r"must be that of .*teacher\.json, got another .*mod"
        ):
            run(other)
    with running(teacher_app(folders["teacher"])) as url:
        run(replace(other, model=replace(parts.model, teacher=url)))
    assert len(expected) == 3
    assert_same_run(parts.out, whole.out)
    local = replace(other, model=replace(parts.model, teacher=str(folders["teacher"])))
    with pytest.raises(ValueError, match=r"(?s)keep the settings.*model\.teacher: http"):
        run(local)
