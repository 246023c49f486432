"""train: the whole loop on tiny models, in seconds."""

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdrl_train import cli, train
from kdrl_train.config import DataConfig, ModelConfig, OptimConfig, SamplingConfig, TrainConfig
from kdrl_train.config_file import load_yaml, update
from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.model.policy import Teacher
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.log import read_records
from tests.train.conftest import EXACT

TIMES = ("seconds", "tokens_per_s", "peak_memory_bytes")
METRICS = {
    *(
        "step",
        "tokens",
        "reward",
        "accuracy",
        "groups_with_signal",
        "rewards_missing",
        "response_length",
    ),
    *("truncated", "entropy", "clip_fraction", "kl_teacher", "teacher_log_ratio", "k2", "kd_share"),
    *(
        "kd_coef",
        "policy_coef",
        "sampler_mismatch_mean",
        "sampler_mismatch_max",
        "loss",
        "grad_norm",
        "learning_rate",
    ),
    *(
        "verifier_right",
        "verifier_wrong",
        "verifier_unparseable",
        "verifier_timeout",
        "verifier_restarts",
    ),
    *("verifier_error", "tokens_per_s", "seconds", "seconds_rollout", "seconds_verify"),
    *("seconds_teacher", "seconds_update", "seconds_sync", "peak_memory_bytes", "kd_flip_share"),
    *(f"teacher_log_ratio_p{q}" for q in (10, 50, 90, 99)),
    *("teacher_log_ratio_counts", "response_length_counts"),
    *(f"tokens_per_s_{stage}" for stage in ("rollout", "verify", "teacher", "update")),
}


def run(config: TrainConfig) -> list[dict[str, Any]]:
    """Train quietly; the rows of metrics.jsonl."""
    folder = train.main(config, Console(file=io.StringIO()))
    assert folder == config.out
    return read_records(folder)


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def test_resumed_run_equals_the_uninterrupted_one(config: Callable[..., TrainConfig]) -> None:
    method = replace(PRESETS["kdrl_annealed"], kd_coef=replace(EXACT.kd_coef, kind="cosine"))
    whole = config("whole", method=method)
    parts = config("parts", method=method)
    expected = run(whole)
    first = run(replace(parts, steps=1, save_every=1))
    assert without_times(first) == without_times(expected[:1])
    with pytest.raises(ValueError, match=r"out must be a new folder, got .*pass --resume"):
        run(parts)
    with pytest.raises(ValueError, match=r"(?s)keep the settings of.*  seed: 0 before, 1 now"):
        run(replace(parts, resume=True, seed=1))
    rows = run(replace(parts, resume=True))
    assert without_times(rows) == without_times(expected)
    saved = [load_yaml(c.out / "config.yaml") for c in (whole, parts)]
    assert saved[1] == saved[0] | {"out": str(parts.out)}  # --config does not inherit resume
    theirs = weights(whole.out / "model")
    for name, tensor in weights(parts.out / "model").items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_resumed_run_needs_its_problems(config: Callable[..., TrainConfig]) -> None:
    settings = config(steps=1, method=PRESETS["grpo"])
    path = settings.out.with_name("data.jsonl")
    text = Path(settings.data.path).read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    settings = replace(settings, data=replace(settings.data, path=str(path)))
    run(settings)
    more = replace(settings, resume=True, steps=2)
    lines = text.splitlines()
    path.write_text("\n".join([*lines[1:], lines[0]]), encoding="utf-8")  # in another order
    with pytest.raises(ValueError, match=r"data\.path must hold the problems that it held at"):
        run(more)
    assert len(read_records(settings.out)) == 1
    path.write_text(text, encoding="utf-8")
    meta = settings.out / "checkpoints" / "step_000001" / "meta.json"
    older = json.loads(meta.read_text(encoding="utf-8"))
    for key in ("data", "sha256", "sha256_of_this_text"):  # as it was before these were saved
        del older[key]
    meta.write_text(json.dumps(older), encoding="utf-8")
    assert len(run(more)) == 2
    problems, hashes = (
        event["message"]
        for event in jsonl.read(settings.out / "events.jsonl")
        if event["event"] == "warning" and not event["message"].startswith("settings: ")
    )
    assert "does not say which problems the run had" in problems
    assert "step_000001 has no hashes of its files, as it was saved by an older" in hashes


def test_resume_needs_a_checkpoint(config: Callable[..., TrainConfig]) -> None:
    settings = config(resume=True)
    message = r"out must hold a run to resume, got .*run, which has neither .*: drop --resume"
    with pytest.raises(ValueError, match=message):
        run(settings)
    assert not settings.out.exists()
    settings.out.mkdir()
    files = {"metrics.jsonl": '{"step": 0}\n'}
    for name, text in files.items():
        (settings.out / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        run(settings)
    assert {p.name: p.read_text("utf-8") for p in settings.out.iterdir()} == files
    with pytest.raises(ValueError, match=r"holds metrics.jsonl: .*or choose another --out"):
        run(replace(settings, resume=False))


@pytest.mark.parametrize("policy", ["student", "llama"])
def test_a_run_leaves_what_it_should(
    config: Callable[..., TrainConfig], folders: dict[str, Path], policy: str
) -> None:
    settings = config(policy=policy, samples_per_step=3, steps=2, method=PRESETS["kdrl"])
    rows = run(settings)
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert set(row) == METRICS
        counts = [row.pop(name) for name in ("teacher_log_ratio_counts", "response_length_counts")]
        assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in row.values())
        assert sum(counts[0]) == row["tokens"]  # each token is distilled
        assert sum(counts[1]) == 16  # completions
        assert row["verifier_right"] + row["verifier_wrong"] == 16
        assert row["accuracy"] == row["verifier_right"] / 16
        assert row["sampler_mismatch_max"] < 1e-4
        assert row["clip_fraction"] == 0.0
        assert row["kd_share"] == 1.0
        assert (
            row["teacher_log_ratio_p10"]
            < row["teacher_log_ratio_p50"]
            < row["teacher_log_ratio_p90"]
        )
        assert row["kd_flip_share"] == 0.0  # beta l is 100 times smaller than the advantages
        assert (row["kd_coef"], row["learning_rate"]) == (2e-3, 1e-3)
        assert 0 < row["entropy"] < math.log(258)
    saved = update(TrainConfig(), load_yaml(settings.out / "config.yaml"))
    assert saved == settings
    names = {path.name for path in (settings.out / "checkpoints").iterdir()}
    assert names == {"LATEST", "step_000002"}
    samples = (settings.out / "samples" / "step_000001.jsonl").read_text("utf-8").splitlines()
    assert len(samples) == 3
    assert {json.loads(line)["reward"] for line in samples} <= {0.0, 1.0}
    before, after = weights(folders[policy]), weights(settings.out / "model")
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_distillation_brings_the_policy_to_its_teacher(config: Callable[..., TrainConfig]) -> None:
    method = MethodConfig(policy="off", kd="rkl", kd_coef=ScheduleConfig(initial=1.0))
    optim = OptimConfig(learning_rate=1e-2, micro_batch_tokens=256, max_grad_norm=10)
    rows = run(config(steps=12, method=method, optim=optim))
    assert rows[-1]["kl_teacher"] < 0.6 * rows[0]["kl_teacher"]


def test_rewards_alone_raise_the_reward(config: Callable[..., TrainConfig]) -> None:
    sampling = SamplingConfig(prompts_per_step=4, group_size=16, max_new_tokens=8)
    optim = OptimConfig(learning_rate=3e-3, micro_batch_tokens=512)
    model = replace(config().model, teacher=None)
    rows = run(
        config(steps=12, method=PRESETS["grpo"], optim=optim, sampling=sampling, model=model)
    )
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.25
    assert rows[0]["kl_teacher"] is None
    assert rows[0]["kd_coef"] is None


def test_masked_completions_cost_no_teacher(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(Teacher, "forward", refuse)
    for mask in ("wrong", "wrong_group"):
        method = replace(EXACT, kd_mask=mask, policy="off")
        rows = run(config(mask, reward="always_right", steps=1, method=method))
        assert rows[0]["kd_share"] == 0.0
        assert rows[0]["kl_teacher"] is None
        assert rows[0]["grad_norm"] == 0.0
        assert rows[0]["entropy"] > 0
    with pytest.raises(AssertionError, match="the teacher ran"):
        run(config("unmasked", reward="always_right", steps=1))


def test_a_reward_for_the_format_is_not_right(config: Callable[..., TrainConfig]) -> None:
    """Rewards of 0.1 and 1.1: only the latter are right, so the former are distilled."""
    method = replace(EXACT, kd_mask="wrong", kd_coef=ScheduleConfig(kind="reward_adaptive"))
    settings = config(reward="format_pays", steps=1, samples_per_step=16, method=method)
    (row,) = run(settings)
    assert 0 < row["accuracy"] == row["verifier_right"] / 16 < 1
    assert row["kd_share"] > 0
    for line in jsonl.read(settings.out / "samples" / "step_000000.jsonl"):
        assert line["outcome"] == ("right" if line["reward"] > 1 else "wrong")
        assert line["outcome"] == "wrong" or line["kd_weight"] == 0.0


@pytest.mark.parametrize("template", [None, "{prompt} {answer}"])
def test_the_first_line_says_what_a_self_teacher_reads(template: str | None) -> None:
    model = ModelConfig(policy="student", teacher="self")
    read = "the policy's prompts" if template is None else "data.teacher_template"
    config = TrainConfig(model=model, data=DataConfig(path="a", teacher_template=template))
    line = f"runs/train: training student, teacher self (frozen, reads {read}), on a"
    assert train.title(config) == line


def test_a_missing_reward_is_counted_and_left_out(config: Callable[..., TrainConfig]) -> None:
    sampling = SamplingConfig(prompts_per_step=2, group_size=16, max_new_tokens=4)
    lines = io.StringIO()
    settings = config(reward="one_missing", steps=1, sampling=sampling)
    train.main(settings, Console(file=lines))
    (row,) = read_records(settings.out)
    assert 0 < row["verifier_error"] < 32
    model, data = settings.model, settings.data
    assert lines.getvalue().splitlines()[0] == (
        f"{settings.out}: training {model.policy}, teacher {model.teacher}, on {data.path}"
    )
    first = re.search(r"step 1: (\d+) of 32 rewards failed; first: (\S+): (.*)", lines.getvalue())
    assert int(first[1]) == row["verifier_error"]
    assert first[2].startswith("task.jsonl:")
    assert first[3] == "reward must be a finite number, got nan"
    assert row["rewards_missing"] == row["verifier_error"]
    assert math.isfinite(row["loss"])


def test_a_prompt_without_any_reward_stops_the_run(
    config: Callable[..., TrainConfig],
) -> None:
    lines = io.StringIO()
    sampling = SamplingConfig(prompts_per_step=20, group_size=2, max_new_tokens=2)
    settings = config(reward="fails_on_three", sampling=sampling)
    message = r"got none for the 2 of task\.jsonl:\d+ at step 0; first: ValueError: three is \[unl"
    with pytest.raises(ValueError, match=message):
        train.main(settings, Console(file=lines))
    assert "step 1: 8 of 40 rewards failed; first: task.jsonl:" in lines.getvalue()
    assert "ValueError: three is [unlucky]" in lines.getvalue()
    assert read_records(settings.out) == []


@pytest.mark.fault("weights or gradient not finite")
def test_a_gradient_that_is_not_finite_stops_before_the_step(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingConfig(prompts_per_step=2, group_size=16, max_new_tokens=4)
    settings = config(reward="one_missing", steps=2, save_every=1, sampling=sampling)
    advantages, calls = grpo.advantages, []

    def break_second_step(*arguments: Any) -> Tensor:
        calls.append(1)
        return advantages(*arguments) * (math.inf if len(calls) > 1 else 1)

    monkeypatch.setattr(grpo, "advantages", break_second_step)
    with pytest.raises(FloatingPointError, match=r"at step 1: stopped before the optimiser step"):
        run(settings)
    dump = torch.load(settings.out / "failed_step_000001.pt")
    failed = [r for r, reward in enumerate(dump["rewards"].flatten()) if reward.isnan()]
    assert failed
    assert dump["errors"] == dict.fromkeys(failed, "reward must be a finite number, got nan")
    assert dump["rewards"].shape == (2, 16)
    assert len(dump["completion_ids"]) == 32
    assert [row["step"] for row in read_records(settings.out)] == [0]
    monkeypatch.undo()
    rows = run(replace(settings, resume=True))
    assert [row["step"] for row in rows] == [0, 1]


def test_bfloat16_computes_what_float32_does_but_for_rounding(
    config: Callable[..., TrainConfig], folders: dict[str, Path]
) -> None:
    base = config("bfloat16", steps=1)
    settings = replace(base, model=replace(base.model, dtype="bfloat16"))
    row, exact = run(settings)[0], run(config("float32", steps=1))[0]
    assert row["kl_teacher"] == pytest.approx(exact["kl_teacher"], rel=0.1)
    assert row["entropy"] == pytest.approx(exact["entropy"], rel=0.1)
    assert 1e-6 < row["sampler_mismatch_mean"] < 0.1  # generate rounds its logits to bfloat16
    after = weights(settings.out / "model")
    before = weights(folders["student"])
    for name, tensor in after.items():  # a step of 1e-3 on float32 weights, not a rounded one
        assert tensor.dtype == torch.float32
        moved = (tensor - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-3, rel=1e-2), name


def test_over_long_prompts_are_left_out_of_a_run(config: Callable[..., TrainConfig]) -> None:
    settings = config(steps=3)
    lines = Path(settings.data.path).read_text(encoding="utf-8").splitlines()
    path = settings.out.with_name("long.jsonl")
    long = json.dumps({"question": "1+1+1=", "answer": "3"})  # 6 tokens, all others have 4
    path.write_text("\n".join([long, *lines, long]), encoding="utf-8")
    data = replace(settings.data, path=str(path), max_prompt_tokens=5)
    run(replace(settings, data=data))
    samples = [jsonl.read(file) for file in sorted((settings.out / "samples").iterdir())]
    ids = {sample["id"] for step in samples for sample in step}
    assert len(ids) == 12  # 3 steps of 4 prompts, each once: those left out have no turn
    assert not ids & {"long.jsonl:1", "long.jsonl:22"}
    (warning,) = [e for e in jsonl.read(settings.out / "events.jsonl") if e["event"] == "warning"]
    assert warning["message"].startswith("prompts: 2 of 22 problems are left out")


def test_preflight_stops_a_run_before_its_folder_exists(
    config: Callable[..., TrainConfig],
) -> None:
    sampling = SamplingConfig(max_new_tokens=4096)
    with pytest.raises(ValueError, match=r"(?s)must pass its preflight.*a window of 256 tokens"):
        run(config(sampling=sampling))
    assert not config().out.exists()


@pytest.mark.slow
@pytest.mark.fault("reward function")
def test_half_a_character_from_a_reward_ends_nothing(
    config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(steps=2, reward="half_a_character")
    held_out = replace(settings.eval, every=1, data=settings.data, max_problems=4)
    settings = replace(settings, eval=held_out)
    train.main(settings)
    for file in settings.out.rglob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            json.loads(line)
    assert r"half \\ud800" in (settings.out / "events.jsonl").read_text(encoding="utf-8")
    page, scores = tmp_path / "page.html", tmp_path / "scores.json"
    assert cli.main(["report", str(settings.out), "--out", str(page)]) == 0
    options = ["--config", str(settings.out / "config.yaml"), "--max-problems", "2"]
    assert cli.main(["eval", *options, "--samples", "2", "--out", str(scores)]) == 0
    assert "\x1b[2J" not in capsys.readouterr().out
    assert page.read_text(encoding="utf-8")
    assert json.loads(scores.read_text(encoding="utf-8"))
