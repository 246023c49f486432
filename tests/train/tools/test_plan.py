"""plan: what fits, what does not and why, its files and its messages."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kdrl_train import cli
from kdrl_train.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.config_file import save_yaml, to_dict
from kdrl_train.method.presets import PRESETS
from kdrl_train.tools.plan import command
from kdrl_train.tools.plan.command import PlanConfig
from tests.train.estimate_cases import write_config


def arguments(models: dict[str, str], **changes: str) -> list[str]:
    options = {
        "model.policy": models["7b"],
        "model.teacher": models["7b"],
        "model.dtype": "bfloat16",
        "gpus": "64",
        "sampling.max-new-tokens": "8192",
        "sampling.batch-size": "64",
    } | changes
    return ["plan", *(part for key, value in options.items() for part in (f"--{key}", value))]


def test_an_estimate_that_fits(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    options = arguments(models, json=str(path), **{"optim.micro-batch-tokens": "9216"})
    assert cli.main([*options, "--model.gradient-checkpointing"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "fits" in out
    assert "estimate" in out
    saved = json.loads(path.read_text())
    assert saved["fits"]
    assert saved["causes"] == {}
    assert saved["peak_bytes"] == max(saved["moments"].values()) < saved["limit_bytes"] == 76e9
    weights = next(t for t in saved["memory"] if t["name"] == "weights, float32")
    assert weights["value"] == 4 * 7_615_616_512 / 64
    assert saved["loading_bytes"] == 4 * 7_615_616_512
    assert "rank 0 takes 30.46 GB of CPU memory" in out
    assert saved["seconds"] >= saved["seconds_communication_hidden"] > 0
    assert saved["tokens_per_s"] == pytest.approx(64 * 8 * 8192 / saved["seconds"])


def test_a_mixture_holds_what_the_reverse_kl_holds(models: dict[str, str]) -> None:
    model = ModelConfig(policy=models["7b"], teacher=models["7b"], dtype="bfloat16")
    methods = (
        replace(PRESETS["kdrl"], kd="rkl"),
        replace(PRESETS["kdrl"], kd="rkl+fkl", fkl_share=0.3),
        PRESETS["kdrl"],
    )
    rkl, mixture, k2 = (
        command.make_estimate(PlanConfig(model=model, method=method, gpus=8)) for method in methods
    )
    assert mixture.memory == rkl.memory != k2.memory


def test_what_does_not_fit_is_named_with_its_remedy(models: dict[str, str]) -> None:
    config = PlanConfig(
        model=ModelConfig(policy=models["7b"], dtype="bfloat16"),
        method=PRESETS["grpo"],
        optim=OptimConfig(micro_batch_tokens=16384),
        gpus=8,
    )
    estimate = command.make_estimate(config)
    assert not estimate.fits
    causes = {term.name: term.remedy for term in estimate.causes}
    kept = "--model.gradient-checkpointing, or lower optim.micro_batch_tokens"
    assert causes["activations"] == kept
    out = io.StringIO()
    assert command.main(config, Console(file=out, width=250)) == 1
    text = out.getvalue()
    line = next(line for line in text.splitlines() if line.startswith("│ activations "))
    assert kept in line
    assert "does not fit" in text
    assert "GB too much" in text
    recomputed = replace(config, model=replace(config.model, gradient_checkpointing=True))
    assert command.make_estimate(recomputed).peak < estimate.peak


def test_causes_are_the_largest_terms_that_exceed(models: dict[str, str]) -> None:
    """One byte too much blames one term; all of it blames everything that has a remedy."""
    estimate = command.make_estimate(
        PlanConfig(
            model=ModelConfig(policy=models["7b"], teacher=models["7b"]),
            sampling=SamplingConfig(batch_size=8),
            gpus=1,
        )
    )
    worst = max(estimate.moments, key=lambda name: estimate.moments[name])
    largest = max(
        (t for t in estimate.memory if worst in t.when and t.remedy), key=lambda term: term.value
    )
    assert replace(estimate, available_bytes=estimate.peak - 1).causes == [largest]
    assert replace(estimate, available_bytes=estimate.peak).causes == []
    everything = {term.name for term in estimate.memory if term.remedy}
    assert {t.name for t in replace(estimate, available_bytes=0.0).causes} == everything


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": "0"}, "gpus must be at least 1, got 0"),
        ({"gpu-memory": "-1"}, "gpu_memory must be greater than 0, got -1.0"),
        ({"reserve": "1"}, "reserve must be less than 1, got 1.0"),
        ({"gemm-share": "0"}, "gemm_share must be greater than 0, got 0.0"),
        ({"tokens": "8193"}, "tokens must be at most sampling.max_new_tokens = 8192, got 8193"),
        ({"prompt-tokens": "1025"}, "must be at most data.max_prompt_tokens = 1024, got 1025"),
        ({"prompt-tokens": "0"}, "prompt_tokens must be at least 1, got 0"),
        ({"optim.head-impl": "reference"}, "optim.head_impl must not be reference"),
        ({"model.tensor-parallel": "2"}, "model.tensor_parallel must be 1 to be planned, got 2"),
        ({"optim.workspace-bytes": "1000"}, "workspace_bytes must be at least"),
        ({"model.policy": ""}, "model.policy must name a folder or hub id, got nothing"),
        ({"model.policy": "/nowhere"}, "model.policy must be a folder with the config.json"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_bad_input_is_named(
    models: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    message: str,
) -> None:
    assert cli.main(arguments(models, **change)) == 1
    captured = capsys.readouterr()
    text = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert message in text


def test_a_missing_teacher_and_an_unknown_model_are_named(
    models: dict[str, str], tmp_path: Path
) -> None:
    model = ModelConfig(policy=models["tied"])
    with pytest.raises(ValueError, match=r"model\.teacher must name a folder or hub id"):
        command.make_estimate(PlanConfig(model=model))
    for family in ("rwkv", "xlstm"):
        folder = write_config(tmp_path / family, family, hidden_size=64, num_hidden_layers=2)
        with pytest.raises(
            ValueError, match=r"model\.policy = .*whose layers are known, got .*LM: "
        ):
            command.make_estimate(PlanConfig(model=ModelConfig(policy=folder)))


def test_the_config_of_a_run_and_a_preset(models: dict[str, str], tmp_path: Path) -> None:
    run = TrainConfig(model=ModelConfig(policy=models["tied"], teacher=models["teacher"]))
    save_yaml(run, tmp_path / "config.yaml")
    path = tmp_path / "plan.json"
    options = ["plan", "--config", str(tmp_path / "config.yaml"), "--json", str(path)]
    assert cli.main(options) == 0
    names = {term["name"] for term in json.loads(path.read_text())["memory"]}
    assert "teacher" in names
    options = ["plan", "--model.policy", models["tied"], "--preset", "grpo", "--json", str(path)]
    assert cli.main(options) == 0
    names = {term["name"] for term in json.loads(path.read_text())["memory"]}
    assert "teacher" not in names


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--help-all"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in to_dict(PlanConfig()):
        assert name.replace("_", "-") in out, name


def test_each_teacher_is_counted_where_it_is(models: dict[str, str]) -> None:
    places = {"math": models["7b"], "far": "http://host:1"}
    model = ModelConfig(policy=models["7b"], teacher=models["untied"], teachers=places)
    config = PlanConfig(model=model, data=DataConfig(teacher_column="t"), method=PRESETS["kdrl"])

    def teachers(config: PlanConfig) -> dict[str, float]:
        memory = command.make_estimate(config).memory
        return {t.name: t.value for t in memory if t.name in ("teacher", "the other teachers")}

    sizes = {"teacher": 4 * 7_615_616_512, "the other teachers": 4 * 1736}
    assert teachers(config) == sizes
    assert teachers(replace(config, gpus=8)) == {name: size / 8 for name, size in sizes.items()}
    moved = replace(config, model=replace(model, move_teachers=True))
    assert teachers(moved) == {"teacher": sizes["teacher"]}
    alone = replace(config, model=replace(model, teachers={}), data=DataConfig())
    assert teachers(alone) == {"teacher": sizes["the other teachers"]}
