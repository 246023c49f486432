"""--config RUN/config.yaml of the commands that are not `train`: a run's settings become theirs."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kdrl_train import cli, train
from kdrl_train.commands import COMMANDS
from kdrl_train.config import (
    DataConfig,
    EngineConfig,
    EvalConfig,
    EvaluateConfig,
    LoraConfig,
    OptimConfig,
    TrainConfig,
)
from kdrl_train.config_file import save_yaml
from kdrl_train.method.presets import PRESETS
from kdrl_train.tools import evaluate, replay, sft
from kdrl_train.tools.serve import command as serve

Config = Callable[..., TrainConfig]


def parse(command: str, *options: str) -> Any:
    """Read the settings of a command as `cli.run` does."""
    modules = {"eval": evaluate, "replay": replay, "serve": serve, "sft": sft}
    classes = (EvaluateConfig, replay.ReplayConfig, serve.ServeConfig, sft.SftConfig)
    default = dict(zip(modules, classes, strict=True))[command]()
    assert COMMANDS[command].of_run
    return cli.parse(default, options, command, "", (), modules[command].of_run)


@pytest.fixture
def run(config: Config) -> TrainConfig:
    """A run's settings, saved in its folder, which holds nothing else yet."""
    settings = config(
        data=DataConfig(path="train.jsonl", prompt_template="Q: {prompt}", system_prompt="Brief."),
        eval=EvalConfig(data=DataConfig(path="held.jsonl"), every=2, samples=3, max_problems=7),
        seed=5,
    )
    settings.out.mkdir()
    save_yaml(settings, settings.out / "config.yaml")
    return settings


def file_of(run: TrainConfig) -> str:
    return str(run.out / "config.yaml")


def test_eval_measures_what_the_run_measures(run: TrainConfig) -> None:
    taken = parse("eval", "--config", file_of(run))
    assert (taken.data, taken.samples, taken.max_problems) == (run.eval.data, 3, 7)
    assert (taken.sampling, taken.reward, taken.seed) == (run.sampling, run.reward, 5)
    assert taken.out is None  # not the run's folder
    held_out = replace(run.eval, sets={"b": run.data}, temperature=0.5, max_new_tokens=99)
    save_yaml(replace(run, eval=held_out), run.out / "config.yaml")
    taken = parse("eval", "--config", file_of(run))
    assert (taken.sets, taken.greedy) == ({"b": run.data}, False)
    assert taken.sampling == replace(run.sampling, temperature=0.5, max_new_tokens=99)
    greedy = replace(run.eval, greedy=True)
    save_yaml(replace(run, eval=greedy), run.out / "config.yaml")
    assert parse("eval", "--config", file_of(run)).greedy
    assert taken.max_sampler_mismatch is None
    save_yaml(replace(run, engine=EngineConfig(max_sampler_mismatch=0.2)), run.out / "config.yaml")
    assert parse("eval", "--config", file_of(run)).max_sampler_mismatch == 0.2
    save_yaml(replace(run, eval=replace(greedy, data=DataConfig())), run.out / "config.yaml")
    assert not parse("eval", "--config", file_of(run)).greedy
    save_yaml(replace(run, eval=EvalConfig()), run.out / "config.yaml")
    taken = parse("eval", "--config", file_of(run), "--data.path", "test.jsonl")
    assert taken.data == replace(run.data, path="test.jsonl")
    assert taken.max_problems is None


def test_eval_takes_the_policy_of_the_folder(run: TrainConfig, tmp_path: Path) -> None:
    assert parse("eval", "--config", file_of(run)).model == run.model  # nothing is trained yet
    for step in (2, 10):
        (run.out / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    taken = parse("eval", "--config", file_of(run)).model
    assert taken == replace(run.model, weights=run.out / "checkpoints" / "step_000010")
    (run.out / "model").mkdir()
    started = replace(run, model=replace(run.model, weights=tmp_path / "start"))
    save_yaml(started, run.out / "config.yaml")
    taken = parse("eval", "--config", file_of(run)).model
    assert taken == replace(run.model, policy=str(run.out / "model"))
    moved = run.out.rename(tmp_path / "moved")
    taken = parse("eval", "--config", str(moved / "config.yaml")).model
    assert taken.policy == str(moved / "model")
    options = ("--model.policy", "other", "--sampling.temperature", "0.5")
    taken = parse("eval", "--config", str(moved / "config.yaml"), *options)
    assert (taken.model.policy, taken.sampling.temperature) == ("other", 0.5)


def test_eval_of_a_run_needs_no_teachers_server(run: TrainConfig, tiny: Callable[..., Any]) -> None:
    model, url = tiny("qwen2"), "http://127.0.0.1:9"  # nobody listens there
    policy = replace(run.model, policy=str(run.out / "model"), teacher=url)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
        evaluate.common_width(model, policy)
    assert evaluate.common_width(model, replace(policy, teacher_api="openai")) == 258  # not asked
    for said, columns in ((250, 250), (300, 258), (None, 258)):
        file = run.out / "teacher.json"
        file.write_text(json.dumps({"vocab_size": said}), encoding="utf-8")
        assert evaluate.common_width(model, policy) == columns
        start = replace(policy, policy="start", weights=run.out / "checkpoints" / "step_000002")
        assert evaluate.common_width(model, start) == columns


def test_eval_takes_no_teacher_that_it_does_not_read(run: TrainConfig) -> None:
    saved = run.out / "checkpoints" / "step_000002"
    saved.mkdir(parents=True)
    adapters = LoraConfig(rank=2)  # with self frozen no other weights are accepted
    cases = (
        ("grpo", replace(run.model, teacher="http://127.0.0.1:9", lora=adapters)),
        ("grpo", replace(run.model, teacher="gone", teachers={"math": "gone"})),
        ("kdrl", replace(run.model, teacher="self", lora=adapters)),
        ("kdrl", replace(run.model, teacher="self", self_teacher="ema", ema_decay=0.5)),
    )
    for preset, model in cases:
        data = replace(run.data, teacher_column="of" if model.teachers else None)
        settings = replace(run, model=model, data=data, method=PRESETS[preset])
        save_yaml(settings, run.out / "config.yaml")
        taken = parse("eval", "--config", file_of(run)).model
        assert taken == replace(run.model, teacher=None, lora=model.lora, weights=saved)


def test_eval_samples_no_token_that_one_of_several_teachers_lacks(
    run: TrainConfig, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("qwen2")
    tiny("llama", vocab_size=257).config.save_pretrained(tmp_path / "narrow")
    tiny("llama", vocab_size=300).config.save_pretrained(tmp_path / "wide")
    policy = replace(
        run.model,
        policy=str(run.out / "model"),
        teacher=str(tmp_path / "wide"),
        teachers={"math": str(tmp_path / "narrow"), "far": "http://127.0.0.1:9"},
    )
    (run.out / "teacher_far.json").write_text(json.dumps({"vocab_size": 250}), encoding="utf-8")
    assert evaluate.common_width(model, policy) == 250
    (run.out / "teacher_far.json").write_text(json.dumps({"vocab_size": None}), encoding="utf-8")
    assert evaluate.common_width(model, policy) == 257
    assert evaluate.common_width(model, replace(policy, teachers={})) == 258


def test_serve_replay_and_sft_take_their_part(run: TrainConfig) -> None:
    taken = parse("serve", "--config", file_of(run), "--port", "99")
    assert (taken.model, taken.port, taken.host) == (run.model, 99, "127.0.0.1")
    for step in (3, 12):
        (run.out / f"failed_step_{step:06d}.pt").touch()
    taken = parse("replay", "--config", file_of(run))
    assert taken.file == run.out / "failed_step_000012.pt"
    taken = parse("sft", "--config", file_of(run))
    assert (taken.data, taken.model, taken.seed) == (run.data, run.model.policy, 5)


@pytest.mark.fault("hostile model folder")
def test_a_runs_file_does_not_trust_the_code_of_its_model(run: TrainConfig) -> None:
    trusting = replace(run, model=replace(run.model, trust_remote_code=True))
    save_yaml(trusting, run.out / "config.yaml")
    for command in ("eval", "serve"):
        assert not parse(command, "--config", file_of(run)).model.trust_remote_code
        option = "--model.trust-remote-code"
        assert parse(command, "--config", file_of(run), option).model.trust_remote_code
    for command in ("replay", "sft"):
        assert not parse(command, "--config", file_of(run)).trust_remote_code
        assert parse(command, "--config", file_of(run), "--trust-remote-code").trust_remote_code


def test_a_file_of_the_command_itself_is_read_as_before(tmp_path: Path) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text("samples: 9\ndata: {path: a.jsonl}\nout: numbers.json\n", encoding="utf-8")
    taken = parse("eval", "--config", str(file))
    assert (taken.samples, taken.data.path, taken.out) == (9, "a.jsonl", Path("numbers.json"))
    file.write_text("samples: 9\nsteps: 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown key steps.*; there are out, .*seed, samples"):
        parse("eval", "--config", str(file))
    file.write_text("optim: {learning_rat: 3}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown key optim\.learning_rat \(did you mean"):
        parse("eval", "--config", str(file))


def test_eval_of_a_run_gives_the_numbers_of_its_last_evaluation(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(steps=1, optim=OptimConfig(learning_rate=3e-2))
    data = replace(settings.data, prompt_template="{prompt} ", max_prompt_tokens=6)
    held = tmp_path / "held.jsonl"
    rows = [{"question": f"{a}*{a}=", "answer": str(a * a)} for a in (1, 2, 12, 3)]  # 12: 7 tokens
    held.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluation = EvalConfig(data=replace(data, path=str(held)), every=1, samples=3)
    prefixed = replace(evaluation.data, prompt_template="Q: {prompt}", max_prompt_tokens=99)
    evaluation = replace(evaluation, max_problems=4, sets={"prefixed": prefixed})
    train.main(replace(settings, data=data, eval=evaluation), Console(file=io.StringIO()))
    record = json.loads((settings.out / "metrics.jsonl").read_text(encoding="utf-8"))
    capsys.readouterr()
    out = tmp_path / "eval.json"
    assert cli.main(["eval", "--config", file_of(settings), "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["problems"], result["left_out"]) == (3, 1)
    assert result["avg_at_k"] == record["eval_avg_at_k"]
    assert result["mean_length"] == record["eval_length"]
    printed = capsys.readouterr().out
    assert f"{settings.out / 'model'} on 3 problems of {held}" in printed
    assert "1 of 4 problems are left out: " in printed
    assert "wrote its prompts otherwise" not in printed
    policy = ("--model.policy", str(settings.out / "model"), "--model.device", "cpu")
    small = ("--samples", "1", "--sampling.max-new-tokens", "1", "--data.path", str(held))
    doubtful = ("--data.prompt-template", r"{prompt}\n")
    (settings.out / "model" / "sft.yaml").write_text("data: {prompt_template: '{prompt}'}")
    assert cli.main(["eval", *policy, *small, *doubtful]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "data.prompt_template holds a backslash" in printed
    other = f"{settings.out} wrote its prompts otherwise, by data.prompt_template; --config"
    assert other in printed
    assert "warning: the policy learnt to read prompts with data.prompt_template" in printed
    assert "learns from these problems" not in printed
    assert cli.main(["eval", *policy, *small[:-1], data.path]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"warning: {settings.out} learns from these problems" in printed
