"""config and config_file: wrong files and numbers out of range are refused in one line."""

import math
import re
from pathlib import Path

import pytest
import yaml

from kdrl_train.config import (
    DataConfig,
    EvalConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from kdrl_train.config_file import save_yaml, update
from tests.train.options import parse, write


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{1: 2}", r"data\.template_arguments.* must have names as keys, got 1"),
        ("{tokenize: false}", r"data\.template_arguments must be names .* got 'tokenize'"),
        ("{day: 2026-01-01}", r"data\.template_arguments\.day must be a value of JSON, got "),
        ("{a: .nan}", r"data\.template_arguments\.a must be a value of JSON, got nan"),
        ("[1]", r"data\.template_arguments must be a valid dictionary, got \[1\]"),
        ("{a: 1}\n  chat_template: false", r"must be empty without chat_template, got \{'a': 1\}"),
    ],
)
def test_a_wrong_argument_of_a_template_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse("--config", write(tmp_path / "run.yaml", f"data:\n  template_arguments: {text}"))


def test_an_option_that_is_no_mapping_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse("--data.template-arguments", "thinking", "false")
    error = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "--data.template-arguments: it must hold keys and values, as in '{name: value}'" in error
    assert "got 'thinking false'" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "stepz: 3",
            r"unknown key stepz \(did you mean steps\?\); there are out, resume, allow_changes",
        ),
        ("1: 3", r"unknown key 1; there are out, resume, allow_changes"),
        (
            "optim: {lr: 1}",
            r"unknown key optim\.lr \(did you mean optim\.learning_rate\?\); optim has ",
        ),
        ("optim: {learning_rat: 1}", r"key optim\.learning_rat \(did you mean learning_rate\?\); "),
        ("method: {kd_coef: {end: 1}}", r"unknown key method\.kd_coef\.end; .*kind, initial"),
        ("steps: many", r"steps must be a valid integer, got 'many'"),
        ("steps: '3'", r"steps must be a valid integer, got '3'"),
        ("steps: 1.5", r"steps must be a valid integer, got 1\.5"),
        ("steps: true", r"steps must be a valid integer, got True"),
        ("steps: null", r"steps must be a valid integer, got None"),
        ("eval: {max_problems: true}", r"eval\.max_problems must be a valid integer, got True"),
        ("resume: 1", r"resume must be False, True or 'auto', got 1"),
        ("resume: 'no'", r"resume must be False, True or 'auto', got 'no'"),
        ("model: {policy: 3}", r"model\.policy must be a valid string, got 3"),
        ("out: 3", r"out must be a path, got 3"),
        ("optim: {betas: [0.9]}", r"optim\.betas\[1\] must be given, got \[0\.9\]"),
        ("optim: {betas: [0.1, 0.2, 0.3]}", r"optim\.betas must have no more values, got \[0\.1,"),
        ("optim: {weight_decay: true}", r"optim\.weight_decay must be a valid number, got True"),
        ("optim: 3", r"optim must hold keys and values, got 3"),
        (
            "method: {kd: k1}",
            r"method\.kd must be 'k2', 'k3', 'rkl', 'fkl', 'jsd', .* or 'reward', got 'k1'",
        ),
        ("optim: {learning_rate: high}", r"optim\.learning_rate must be a number, got 'high'"),
        ("sampling: {group_size: 1}", r"group_size must be at least 2 for a policy gradient"),
        (
            "method: {policy: 'off', kd_coef: {kind: reward_adaptive}}\nsampling: {group_size: 1}",
            r'at least 2 for method\.kd_coef\.kind "reward_adaptive", got 1: with one completion',
        ),
        (
            "method: {kd_coef: {kind: step}}",
            r'method\.kd_coef\.at must be one or more increasing steps for kind "step", got \(\)',
        ),
        (
            "method: {kd_coef: {kind: step, at: [1, 2], values: [0.5]}}",
            r"method\.kd_coef\.values must be 2 numbers, .* got \(0\.5,\)",
        ),
        ("method: {kd_coef: {at: 3}}", r"method\.kd_coef\.at must be a list, got 3"),
        (
            "method: {kd_coef: {at: [x]}}",
            r"method\.kd_coef\.at\[0\] must be a valid integer, got 'x'",
        ),
        (
            "method: {kd_coef: {kind: kl_budget, initial: 2}}",
            r"method\.kd_coef\.initial must be in bounds, 0\.0001 to 1\.0, got 2",
        ),
        (
            "method: {policy_coef: {kind: kl_budget}}",
            r'method\.policy_coef\.kind must be .* got "kl_budget": this kind is allowed',
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
        (
            "optim: {final_learning_rate: 1e-7}",
            r'schedule must be "linear" or "cosine" with final_learning_rate 1e-07, got "constant"',
        ),
        (
            "optim: {schedule: linear, final_learning_rate: 1}",
            r"optim\.final_learning_rate must be at most learning_rate, 1e-06, got 1\.0",
        ),
        (
            "steps: 5\noptim: {schedule: cosine, warmup_steps: 5}",
            r'warmup_steps must be less than steps with optim\.schedule "cosine", got 5 and 5',
        ),
        (
            "allow_changes: [seed]",
            r"allow_changes\[0\] must be 'optim\.learning_rate', .* got 'seed'",
        ),
        (
            "eval: {sets: {a: {path: x.jsonl}}}",
            r"eval\.data\.path must be set beside sets, got only a: the set in data is the one",
        ),
        (
            "eval: {data: {path: x}, sets: {a/b: {path: x}}}",
            r"eval\.sets must have names of letters, .* got 'a/b': rename it",
        ),
        (
            "eval: {data: {path: x}, sets: {a: {}}}",
            r"eval\.sets\.a\.path must name a file, .* none",
        ),
        (
            "eval: {data: {path: x}, sets: {a: {pathz: 1}}}",
            r"unknown key eval\.sets\.a\.pathz .*; eval\.sets\.a has path, split",
        ),
        (
            "eval: {keep_best: true}",
            r"eval\.keep_best must be false without every and data\.path, got 0 and '' of them",
        ),
        (
            "reward: {overlong_penalty: 0.5}",
            r"^reward\.overlong_buffer must be at least 1 with overlong_penalty 0\.5, got 0: no",
        ),
        (
            "eval: {greedy: true, temperature: 1}",
            r"eval\.temperature must be None with greedy, got",
        ),
        (
            "model: {teachers: {a b: x}}\ndata: {teacher_column: t}",
            r"model\.teachers must have names of letters, .* got 'a b'",
        ),
        (
            "model: {teachers: {default: x}}\ndata: {teacher_column: t}",
            r"model\.teachers must have names .* got 'default': these are model\.teacher",
        ),
        (
            "model: {teachers: {a: ' '}}\ndata: {teacher_column: t}",
            r"model\.teachers\.a must be a folder, a hub id or a URL, got ' '",
        ),
        (
            "model: {teachers: {a: 'http://key@host:1'}}\ndata: {teacher_column: t}",
            r"model\.teachers\.a must be http://host:port without a user",
        ),
        ("model: {teachers: {a: x}}", r"data\.teacher_column must be set with .* got a: it names"),
        ("data: {teacher_column: t}", r"model\.teachers must be set with .* got 't' and no"),
        (
            "method: {teachers: {default: {}}}\nmodel: {teacher: x}",
            r"method\.teachers\.default must be one of several teachers, got no model\.teachers",
        ),
        (
            "method: {teachers: {b: {}}}\nmodel: {teachers: {a: x}}\ndata: {teacher_column: t}",
            r"method\.teachers\.b must be one of several teachers, got a: correct the name",
        ),
        (
            "model: {teachers: {a: 'http://h:1'}}\ndata: {teacher_column: t}\nmethod: {kd: rkl}\n"
            "teacher: {head: x}",
            r'teacher\.heads\.a must be set for method\.kd "rkl"',
        ),
        (
            "model: {teachers: {a: x}}\ndata: {teacher_column: t}\nteacher: {names: {a: m}}",
            r"teacher\.names\.a must be of one of model\.teachers behind a URL, got none",
        ),
        (
            "method: {policy: 'off', teachers: {a: {kd_coef: {kind: reward_adaptive}}}}\n"
            "model: {teachers: {a: x}}\ndata: {teacher_column: t}\nsampling: {group_size: 1}",
            r'at least 2 for method\.teachers\.a\.kd_coef\.kind "reward_adaptive", got 1',
        ),
        ("log: {trackers: wandb}", r"log\.trackers must be a list, got 'wandb'"),
        (
            "log: {trackers: [mlflow]}",
            r"log\.trackers\[0\] must be 'tensorboard', 'wandb' or 'trackio'",
        ),
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
        ("sampling.temperature", ".nan", "a finite number, got nan"),
        ("sampling.temperature", "0", "greater than 0, got 0"),
        ("reward.timeout_s", "-1", "greater than 0, got -1"),
        ("reward.timeout_s", ".inf", "a finite number, got inf"),
        ("reward.workers", *BELOW_ONE),
        ("teacher.concurrency", *BELOW_ONE),
        ("teacher.timeout_s", "0", "greater than 0, got 0"),
        ("teacher.deadline_s", ".inf", "a finite number, got inf"),
        ("method.clip_low", "2", "at most 1, got 2"),
        ("method.clip_high", "-0.5", "at least 0, got -0.5"),
        ("method.std_floor", "0", "greater than 0, got 0"),
        ("method.jsd_alpha", "1", "less than 1, got 1"),
        ("method.fkl_share", "0", "greater than 0, got 0"),
        ("method.entropy_coef", ".nan", "a finite number, got nan"),
        ("method.kd_coef.initial", "-0.002", "at least 0, got -0.002"),
        ("method.kd_coef.initial", ".inf", "a finite number, got inf"),
        ("method.kd_coef.final", ".nan", "a finite number, got nan"),
        ("method.kd_coef.steps", *BELOW_ONE),
        ("method.kd_coef.patience", *BELOW_ZERO),
        ("method.kd_coef.min_gain", ".nan", "a finite number, got nan"),
        ("method.kd_coef.target_kl", "0", "greater than 0, got 0"),
        ("method.kd_coef.gain", "1", "less than 1, got 1"),
        ("method.kd_coef.at", "[3, 3]", "increasing steps, got (3, 3)"),
        ("method.kd_coef.values", "[0.1]", "0 numbers, one for each of at, got (0.1,)"),
        (
            "method.kd_coef.bounds",
            "[1, 0.5]",
            "two numbers, the smaller one first, got (1.0, 0.5)",
        ),
        ("method.policy_coef.initial", "-1", "at least 0, got -1"),
        ("method.sampler_cap", "1", "greater than 1, got 1"),
        ("optim.updates_per_rollout", *BELOW_ONE),
        ("optim.learning_rate", ".inf", "a finite number, got inf"),
        ("optim.warmup_steps", *BELOW_ZERO),
        ("optim.final_learning_rate", "-1", "at least 0, got -1"),
        ("optim.weight_decay", "-0.1", "at least 0, got -0.1"),
        ("optim.max_grad_norm", "0", "greater than 0, got 0"),
        ("model.head_flat", "-0.1", "at least 0, got -0.1"),
        ("model.head_flat", ".nan", "at least 0, got nan"),
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
    with pytest.raises(ValueError, match=r"^betas\[1\] must be less than 1, got 1\.0"):
        OptimConfig(betas=(0.9, 1.0))
    for key, value in (("seed", -1), ("samples", 0), ("max_problems", 0)):
        with pytest.raises(ValueError, match=rf"^{key} must be at least \d, got {value}"):
            EvaluateConfig(**{key: value})
    with pytest.raises(ValueError, match=r"^max_prompt_tokens must be at least 1, got 0"):
        EvaluateConfig(data=DataConfig(max_prompt_tokens=0))
    for key, value in (("at", "[0]"), ("values", "[-1]"), ("bounds", "[0, 1]")):
        coefficient = {key: yaml.safe_load(value)}
        with pytest.raises(ValueError, match=rf"^method\.kd_coef\.{key}\[0\] must be"):
            update(TrainConfig(), {"method": {"kd_coef": coefficient}})
    assert OptimConfig(max_grad_norm=math.inf).max_grad_norm == math.inf
    assert ModelConfig(policy="m", head_flat=math.inf).head_flat == math.inf
    assert EvalConfig(every=0, max_problems=None).samples == 4


def test_a_preset_without_effect_is_refused(tmp_path: Path) -> None:
    save_yaml(TrainConfig(), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="--preset must leave something to set, got grpo"):
        parse("--preset", "grpo", "--config", str(tmp_path / "config.yaml"))
