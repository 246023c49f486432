"""config, config_file and the command line: who overrides whom, and what is refused."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kdrl_train import cli
from kdrl_train.config import (
    DataConfig,
    EvalConfig,
    EvaluateConfig,
    OptimConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.config_file import differences, load_yaml, save_yaml, to_dict, update
from kdrl_train.method.config import ScheduleConfig
from kdrl_train.method.presets import PRESETS


def parse(*options: str) -> TrainConfig:
    return cli.parse(TrainConfig(), options, "train")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_saved_configuration_loads_as_it_was(tmp_path: Path) -> None:
    config = replace(
        TrainConfig(),
        out=tmp_path / "run",
        method=PRESETS["kdrl_annealed"],
        optim=OptimConfig(betas=(0.8, 0.95), learning_rate=1e-7, workspace_bytes=10**8),
        data=DataConfig(system_prompt="Antwort: ≤ 3 Wörter"),
    )
    save_yaml(config, tmp_path / "config.yaml")
    assert update(TrainConfig(), load_yaml(tmp_path / "config.yaml")) == config
    assert parse("--config", str(tmp_path / "config.yaml")) == config


def test_options_override_the_file_overrides_the_preset(tmp_path: Path) -> None:
    file = write(
        tmp_path / "run.yaml",
        "steps: 7\nmethod: {kd_mask: wrong, clip_high: 0.3}\noptim: {learning_rate: 1e-5}\n",
    )
    options = ("--preset", "kdrl_annealed", "--config", file, "--method.clip-high", "0.4")
    config = parse(*options, "--optim.betas", "0.5", "0.6")
    assert config.method == replace(
        PRESETS["kdrl_annealed"],  # the preset, over the default schedule
        kd_mask="wrong",  # the file, over the preset
        clip_high=0.4,  # the option, over the file
    )
    assert (config.steps, config.optim.learning_rate) == (7, 1e-5)
    assert config.optim.betas == (0.5, 0.6)
    assert config.sampling == SamplingConfig()
    assert parse("--preset=grpo").method.kd is None
    assert parse("--preset", "kdrl", "--method.kd", "rkl").method.kd == "rkl"


def test_lists_of_any_length(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "method: {kd_coef: {kind: step, at: [2], values: [1]}}")
    config = parse("--config", file)
    assert config.method.kd_coef == ScheduleConfig(kind="step", at=(2,), values=(1.0,))
    options = ("--method.kd-coef.at", "2", "5", "--method.kd-coef.values", "0.5", "0")
    longer = parse("--config", file, *options)
    assert longer.method.kd_coef == ScheduleConfig(kind="step", at=(2, 5), values=(0.5, 0.0))
    save_yaml(longer, tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == longer


def test_any_number_of_trackers(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "log: {trackers: [wandb, tensorboard]}\n")
    assert parse("--config", file).log.trackers == ("wandb", "tensorboard")
    assert parse("--config", file, "--log.trackers", "trackio").log.trackers == ("trackio",)
    assert parse().log.trackers == ()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_an_option(name: str) -> None:
    assert parse("--preset", name).method == PRESETS[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", r"unknown key stepz; there are out, resume, seed, steps"),
        ("optim: {lr: 1}", r"unknown key optim\.lr; optim has learning_rate, warmup_steps"),
        ("method: {kd_coef: {end: 1}}", r"unknown key method\.kd_coef\.end; .*kind, initial"),
        ("steps: many", r"steps must be of type int, got 'many'"),
        ("steps: true", r"steps must be of type int, got True"),
        ("resume: 1", r"resume must be of type bool, got 1"),
        ("optim: {betas: [0.9]}", r"optim\.betas must be a list of 2 values, got \[0\.9\]"),
        ("optim: 3", r"optim must hold keys and values, got 3"),
        ("method: {kd: k1}", r"method\.kd must be one of k2, k3, rkl, fkl, jsd, reward, got 'k1'"),
        ("optim: {learning_rate: high}", r"optim\.learning_rate must be of type float"),
        ("sampling: {group_size: 1}", r"group_size must be at least 2 for a policy gradient"),
        (
            "method: {policy: 'off', kd_coef: {kind: reward_adaptive}}\nsampling: {group_size: 1}",
            r'at least 2 for method\.kd_coef\.kind "reward_adaptive", got 1: a group of one is',
        ),
        (
            "method: {kd_coef: {kind: step}}",
            r"method\.kd_coef\.at must be one or more increasing steps from 1 on, got \(\)",
        ),
        (
            "method: {kd_coef: {kind: step, at: [1, 2], values: [0.5]}}",
            r"method\.kd_coef\.values must be 2 numbers, .* got \(0\.5,\)",
        ),
        ("method: {kd_coef: {at: 3}}", r"method\.kd_coef\.at must be a list, got 3"),
        ("method: {kd_coef: {at: [x]}}", r"method\.kd_coef\.at must be of type int, got 'x'"),
        (
            "method: {kd_coef: {kind: kl_budget, initial: 2}}",
            r"method\.kd_coef\.initial must be in method\.kd_coef\.bounds, 0\.0001 to 1\.0, got 2",
        ),
        (
            "method: {policy_coef: {kind: kl_budget}}",
            r'method\.policy_coef\.kind must be .* got "kl_budget": it is for method\.kd_coef',
        ),
        (
            "method: {policy_coef: {kind: switch, patience: 2}}",
            r"eval\.every and eval\.data\.path must be set when method\.policy_coef switches on a "
            r"plateau, got 0 and '': set them, or method\.policy_coef\.patience to 0",
        ),
        (
            "sampling: {prompts_per_step: 6}\noptim: {updates_per_rollout: 4}",
            r"prompts_per_step must be a multiple of optim\.updates_per_rollout, got 6 and 4",
        ),
        ("log: {trackers: wandb}", r"log\.trackers must be a list, got 'wandb'"),
        ("log: {trackers: [mlflow]}", r"log\.trackers must be one of tensorboard, wandb, trackio"),
        ("log: {trackers: [wandb, wandb]}", r"log\.trackers must name each tracker once"),
        ("- 1", r"must hold keys and values, got a list"),
        ("a: [", r"--config must be a YAML file"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse("--config", write(tmp_path / "run.yaml", text))


BELOW_ONE = ("0", "at least 1, got 0")
BELOW_ZERO = ("-1", "at least 0, got -1")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", *BELOW_ZERO),
        ("log.diagnostics_every", *BELOW_ZERO),
        ("steps", *BELOW_ONE),
        ("save_every", *BELOW_ONE),
        ("keep_checkpoints", *BELOW_ONE),
        ("samples_per_step", *BELOW_ZERO),
        ("data.max_prompt_tokens", *BELOW_ONE),
        ("sampling.prompts_per_step", *BELOW_ONE),
        ("sampling.group_size", *BELOW_ONE),
        ("sampling.max_new_tokens", *BELOW_ONE),
        ("sampling.batch_size", *BELOW_ONE),
        ("sampling.temperature", ".nan", "positive and finite, got nan"),
        ("sampling.temperature", "0", "positive and finite, got 0.0"),
        ("reward.timeout_s", "-1", "positive and finite, got -1.0"),
        ("reward.timeout_s", ".inf", "positive and finite, got inf"),
        ("reward.workers", *BELOW_ONE),
        ("teacher.concurrency", *BELOW_ONE),
        ("teacher.timeout_s", "0", "positive and finite, got 0.0"),
        ("teacher.deadline_s", ".inf", "positive and finite, got inf"),
        ("method.clip_low", "1", "at least 0 and below 1, got 1.0"),
        ("method.clip_high", "-0.5", "finite and at least 0, got -0.5"),
        ("method.std_floor", "0", "positive and finite, got 0.0"),
        ("method.jsd_alpha", "1", "in (0, 1), got 1.0"),
        ("method.entropy_coef", ".nan", "finite, got nan"),
        ("method.kd_coef.initial", "-0.002", "finite and at least 0, got -0.002"),
        ("method.kd_coef.initial", ".inf", "finite and at least 0, got inf"),
        ("method.kd_coef.final", ".nan", "finite and at least 0, got nan"),
        ("method.kd_coef.steps", *BELOW_ONE),
        ("method.kd_coef.patience", *BELOW_ZERO),
        ("method.kd_coef.min_gain", ".nan", "finite and at least 0, got nan"),
        ("method.kd_coef.target_kl", "0", "positive and finite, got 0.0"),
        ("method.kd_coef.gain", "1", "in (0, 1), got 1.0"),
        ("method.kd_coef.at", "[3, 3]", "increasing steps from 1 on, got (3, 3)"),
        ("method.kd_coef.at", "[0]", "increasing steps from 1 on, got (0,)"),
        (
            "method.kd_coef.values",
            "[0.1]",
            "0 numbers, one for each of at, finite and at least 0, got (0.1,)",
        ),
        (
            "method.kd_coef.bounds",
            "[1, 0.5]",
            "two positive numbers, the smaller one first, got (1.0, 0.5)",
        ),
        ("method.policy_coef.initial", "-1", "finite and at least 0, got -1.0"),
        ("method.sampler_cap", "1", "above 1 and finite, got 1.0"),
        ("optim.updates_per_rollout", *BELOW_ONE),
        ("optim.learning_rate", ".inf", "positive and finite, got inf"),
        ("optim.warmup_steps", *BELOW_ZERO),
        ("optim.weight_decay", "-0.1", "finite and at least 0, got -0.1"),
        ("optim.max_grad_norm", "0", "positive, got 0.0: inf never clips"),
        ("optim.micro_batch_tokens", *BELOW_ONE),
        ("optim.workspace_bytes", *BELOW_ONE),
        ("eval.data.max_prompt_tokens", *BELOW_ONE),
        ("eval.every", *BELOW_ZERO),
        ("eval.samples", *BELOW_ONE),
        ("eval.max_problems", *BELOW_ONE),
    ],
)
def test_a_number_out_of_range_is_refused(
    tmp_path: Path, key: str, value: str, message: str
) -> None:
    text = value
    for name in reversed(key.split(".")):
        text = f"{{{name}: {text}}}"
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{key} must be {message}')}$"):
        parse("--config", write(tmp_path / "run.yaml", text))


def test_ranges_beyond_one_number() -> None:
    with pytest.raises(ValueError, match=r"optim\.betas\[1\] must be .* below 1, got 1\.0"):
        OptimConfig(betas=(0.9, 1.0))
    for key, value in (("seed", -1), ("samples", 0), ("max_problems", 0)):
        with pytest.raises(ValueError, match=rf"^{key} must be at least \d, got {value}"):
            EvaluateConfig(**{key: value})
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens must be at least 1, got 0"):
        EvaluateConfig(data=DataConfig(max_prompt_tokens=0))
    assert OptimConfig(max_grad_norm=math.inf).max_grad_norm == math.inf
    assert EvalConfig(every=0, max_problems=None).samples == 4


def test_null_and_empty_files(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path / "a.yaml", "method: {kd: null}")).method.kd is None
    assert parse("--config", write(tmp_path / "b.yaml", "")) == TrainConfig()
    with pytest.raises(ValueError, match="there is no such file"):
        parse("--config", str(tmp_path / "absent.yaml"))


def test_a_preset_without_effect_is_refused(tmp_path: Path) -> None:
    save_yaml(TrainConfig(), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="--preset must leave something to set, got grpo"):
        parse("--preset", "grpo", "--config", str(tmp_path / "config.yaml"))


def test_differences_name_nested_keys() -> None:
    old, new = to_dict(TrainConfig()), to_dict(replace(TrainConfig(), seed=1))
    new["optim"] = new["optim"] | {"learning_rate": 1.0, "extra": 2}
    assert differences(old, new) == {
        "seed": (0, 1),
        "optim.learning_rate": (1e-6, 1.0),
        "optim.extra": ("absent", 2),
    }


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in ("demo", "train", "eval", "check", "serve", "sft"))
    assert cli.main([]) == 2
    assert cli.main(["trian"]) == 2
    assert "command must be one of demo, train" in capsys.readouterr().err


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for section in to_dict(TrainConfig()).values():
        for name in section if isinstance(section, dict) else ():
            assert name.replace("_", "-") in out, name
    assert "--preset" in out
    assert "Longest completion, in tokens" in out


def test_an_error_is_one_message_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "run.yaml", "stepz: 3")
    assert cli.main(["train", "--config", file]) == 1
    assert "unknown key stepz" in capsys.readouterr().err


def test_yaml_is_plain(tmp_path: Path) -> None:
    save_yaml(TrainConfig(), tmp_path / "config.yaml")
    content = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert content["out"] == str(Path("runs/train"))
    assert content["optim"]["betas"] == [0.9, 0.999]
