"""Settings that change nothing are named before the first step, and no others."""

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from kdrl_train import cli
from kdrl_train.config import OptimConfig, TrainConfig
from kdrl_train.config_file import RECIPES, load_yaml, save_yaml, update
from kdrl_train.method.config import ScheduleConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.start.unread import READ_BY, RULES, reasons, unread

URL = "http://127.0.0.1:1"
OFF = "method: {kd: null}"
CASES = [
    # what changes nothing; what makes it read; the keys that are named of the first
    ("method: {kd: null, kd_mask: wrong}", "method: {kd: k2}", "method.kd_mask"),
    ("method: {kd: null, kd_eos: mask}", "method: {kd: rkl}", "method.kd_eos"),
    ("method: {kd: null, kd_coef: {initial: 1}}", "method: {kd: k2}", "method.kd_coef.initial"),
    (f"{OFF}\nmodel: {{teacher: x}}", "method: {kd: k2}", "model.teacher"),
    (f"{OFF}\ndata: {{teacher_template: '{{prompt}}'}}", "method: {kd: k2}", "teacher_template"),
    (f"{OFF}\nmodel: {{teacher: '{URL}', teacher_api: openai}}", "method: {kd: k2}", "teacher_api"),
    (
        f"{OFF}\nmodel: {{teachers: {{a: x}}}}\ndata: {{teacher_column: t}}\n"
        "method: {kd: null, teachers: {a: {kd_mask: wrong, kd_weight: 2, kd_coef: {initial: 1}}}}",
        "method: {kd: k2}",
        "model.teachers.a data.teacher_column method.teachers.a.kd_mask method.teachers.a.kd_weight"
        " method.teachers.a.kd_coef.initial",
    ),
    ("teacher: {concurrency: 2}", f"model: {{teacher: '{URL}'}}", "teacher.concurrency"),
    ("model: {teacher_api: openai}", f"model: {{teacher: '{URL}'}}", "model.teacher_api"),
    (
        f"model: {{teacher: '{URL}'}}\nteacher: {{name: m}}",
        "model: {teacher_api: openai}",
        "teacher.name",
    ),
    (
        f"model: {{teacher: x, teachers: {{a: '{URL}'}}, teacher_api: openai}}\n"
        "data: {teacher_column: t}\nteacher: {name: m}",
        f"model: {{teacher: '{URL}'}}",
        "teacher.name",
    ),
    (f"model: {{teacher: '{URL}'}}\nteacher: {{head: x}}", "method: {kd: rkl}", "teacher.head"),
    (
        f"model: {{teacher: '{URL}', move_teachers: true}}",
        "model: {teacher: x}",
        "model.move_teachers",
    ),
    (
        "model: {teacher: self, move_teachers: true, lora: {rank: 2}}",
        "model: {lora: {rank: 0}}",
        "model.move_teachers",
    ),
    (
        "model: {teacher: x, teachers: {a: y}}\ndata: {teacher_column: t}\n"
        "method: {kd_mask: wrong, teachers: {a: {kd_mask: none}, default: {kd_mask: none}}}",
        "model: {teachers: {a: y, b: z}}",
        "method.kd_mask",
    ),
    (
        "model: {teachers: {a: y}}\ndata: {teacher_column: t}\n"
        "method: {kd_coef: {initial: 1}, teachers: {a: {kd_coef: {initial: 2}}}}",
        "model: {teacher: x}",
        "method.kd_coef.initial",
    ),
    ("method: {jsd_alpha: 0.3}", "method: {kd: jsd}", "method.jsd_alpha"),
    ("method: {jsd_alpha: 0.3}", "method: {kd: topk_jsd}", "method.jsd_alpha"),
    ("method: {policy: 'off', advantage: rloo}", "method: {policy: clip}", "method.advantage"),
    (
        "method: {policy: 'off', policy_coef: {initial: 2}}",
        "method: {policy: none}\noptim: {updates_per_rollout: 2}",
        "method.policy_coef.initial",
    ),
    ("method: {clip_high: 0.3}", "optim: {updates_per_rollout: 2}", "method.clip_high"),
    ("method: {clip_low: 0.3}", "engine: {staleness: 1}", "method.clip_low"),
    (
        "method: {policy: cispo, sampler_correction: mask}\nengine: {staleness: 1}",
        "method: {sampler_correction: none}",
        "method.policy",
    ),
    (
        "method: {policy: none, clip_low: 0.3}\noptim: {updates_per_rollout: 2}",
        "method: {policy: cispo}",
        "method.clip_low",
    ),
    ("method: {advantage: rloo, std_floor: 0.1}", "method: {advantage: grpo}", "method.std_floor"),
    ("method: {sampler_cap: 3}", "method: {sampler_correction: mask}", "method.sampler_cap"),
    (
        "model: {head_threshold: 0.1, head_flat: .inf}",
        "model: {head_backward: sketch}",
        "model.head_threshold model.head_flat",
    ),
    (
        "method: {loss: 'a:b'}\nlog: {diagnostics_every: 1}",
        "method: {loss: null}",
        "log.diagnostics_every",
    ),
    (
        "optim: {head_impl: reference, workspace_bytes: 1000000}",
        "optim: {head_impl: torch}",
        "optim.workspace_bytes",
    ),
    (
        "engine: {timeout_s: 3}",
        f"engine: {{kind: vllm_server, url: '{URL}'}}",
        "engine.timeout_s",
    ),
    (
        "engine: {memory_share: 0.5, eager: true}",
        "engine: {kind: vllm}",
        "engine.memory_share engine.eager",
    ),
    ("eval: {every: 2, samples: 8}", "eval: {data: {path: x}}", "eval.every eval.samples"),
    ("eval: {data: {path: x}}", "eval: {every: 2}", "eval.data.path"),
    ("eval: {sets: {a: {path: x}}, data: {path: y}}", "eval: {every: 2}", "eval.sets.a.path"),
    (
        "eval: {every: 2, data: {path: x}, samples: 8, greedy: true}",
        "eval: {greedy: false}",
        "eval.samples",
    ),
    ("log: {project: mine}", "log: {trackers: [wandb]}", "log.project"),
    ("allow_changes: [optim.schedule]", "resume: true", "allow_changes"),
    ("data: {path: x.jsonl, split: test}", "data: {path: x}", "data.split"),
    (
        "data: {max_teacher_prompt_tokens: 8}",
        "data: {teacher_template: '{prompt}'}\nmodel: {teacher: x}",
        "data.max_teacher_prompt_tokens",
    ),
    ("method: {kd_coef: {final: 1}}", "method: {kd_coef: {kind: cosine}}", "method.kd_coef.final"),
    (
        "method: {policy_coef: {steps: 9}}",
        "method: {policy_coef: {kind: switch}}",
        "method.policy_coef.steps",
    ),
    (
        "method: {kd_coef: {at: [1], values: [2]}}",
        "method: {kd_coef: {kind: step}}",
        "method.kd_coef.at method.kd_coef.values",
    ),
    (
        "method: {kd_coef: {target_kl: 1, gain: 0.2, bounds: [0.0001, 2]}}",
        "method: {kd_coef: {kind: kl_budget}}",
        "method.kd_coef.target_kl method.kd_coef.gain method.kd_coef.bounds",
    ),
    (
        "eval: {every: 2, data: {path: x}}\nmethod: {kd_coef: {kind: switch, min_gain: 0.1}}",
        "method: {kd_coef: {patience: 2}}",
        "method.kd_coef.min_gain",
    ),
    (
        "model: {teachers: {a: y}}\ndata: {teacher_column: t}\n"
        "method: {teachers: {a: {kd_coef: {final: 2}}}}",
        "method: {teachers: {a: {kd_coef: {kind: linear, final: 2}}}}",
        "method.teachers.a.kd_coef.final",
    ),
]


def named(config: TrainConfig) -> str:
    return "; ".join(unread(config))


@pytest.mark.parametrize(("idle", "reader", "keys"), CASES, ids=[case[0] for case in CASES])
def test_a_setting_is_named_where_nothing_reads_it(idle: str, reader: str, keys: str) -> None:
    config = update(TrainConfig(), yaml.safe_load(idle))
    for key in keys.split():
        assert f"{key} = " in named(config)
    read = named(update(config, yaml.safe_load(reader)))
    for key in keys.split():
        assert f"{key} = " not in read


def test_a_sentence_names_values_and_the_reason() -> None:
    schedule = replace(PRESETS["kdrl"].kd_coef, final=1e-3, steps=3)
    config = replace(TrainConfig(), method=replace(PRESETS["kdrl"], kd_coef=schedule))
    assert unread(config) == [
        "nothing reads method.kd_coef.final = 0.001, method.kd_coef.steps = 3, as "
        "method.kd_coef.kind is constant"
    ]
    ranks = update(TrainConfig(), {"ranks": {"step_timeout_s": 60}})
    assert unread(ranks, launched=True) == []
    assert "ranks.step_timeout_s = 60.0, as torchrun" in unread(ranks, launched=False)[0]


def test_defaults_presets_and_recipes_set_nothing_in_vain() -> None:
    assert unread(TrainConfig()) == []
    for name, method in PRESETS.items():
        run = replace(TrainConfig(), method=method, optim=OptimConfig(updates_per_rollout=2))
        assert unread(run) == [], name
    for path in RECIPES.glob("*.yaml"):
        assert unread(update(TrainConfig(), load_yaml(path))) == [], path.stem


def test_the_rules_name_settings_that_there_are() -> None:
    for _, _, keys in RULES:
        for key in keys.split():
            attrgetter(key)(TrainConfig())
    schedule = ScheduleConfig()
    assert set(READ_BY) == set(get_args(get_type_hints(ScheduleConfig)["kind"]))
    for names in READ_BY.values():
        for name in names:
            getattr(schedule, name)


def test_check_says_it_in_its_table_and_does_not_fail(
    config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_yaml(config(method=replace(PRESETS["grpo"], kd_eos="mask")), tmp_path / "config.yaml")
    words = ["--config", str(tmp_path / "config.yaml")]
    assert cli.main(["check", *words]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "settings warning nothing reads model.teacher = " in out
    assert "method.kd_eos = mask, as method.kd is None" in out


def typed(*words: str) -> list[str]:
    with pytest.raises(ValueError, match=r"must (be left|leave) out") as error:
        cli.parse(TrainConfig(), words, "train", "", unread=reasons)
    return str(error.value).splitlines()


def test_an_option_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    assert typed("--method.kd", "None", "--method.kd-mask", "wrong", "--log.project", "a") == [
        "--method.kd-mask must be left out, got wrong: method.kd is None",
        "--log.project must be left out, got a: log.trackers has neither wandb nor trackio",
    ]
    file = tmp_path / "run.yaml"
    file.write_text("method: {kd_mask: wrong}\nengine: {timeout_s: 3}\n", encoding="utf-8")
    words = ["--config", str(file), "--method.kd", "None"]  # which switches off what the file has
    config = cli.parse(TrainConfig(), words, "train", "", unread=reasons)
    assert config.method.kd_mask == "wrong"
    assert typed(*words, "--method.kd-eos", "mask") == [
        "--method.kd-eos must be left out, got mask: method.kd is None"
    ]


def test_a_value_of_a_mapping_that_nothing_reads_is_named() -> None:
    (line,) = typed(
        *("--model.teachers", "{a: y}", "--data.teacher-column", "t"),
        *("--method.teachers", "{a: {kd_coef: {initial: 1, final: 2}}}"),
    )
    assert line.startswith(
        "--method.teachers must leave out method.teachers.a.kd_coef.final, got method.teachers.a ="
    )
    assert line.endswith("}: method.teachers.a.kd_coef.kind is constant")


def test_options_of_ranks_are_taken_without_torchrun() -> None:
    words = ["--ranks.step-timeout-s", "60"]
    config = cli.parse(TrainConfig(), words, "train", "", unread=reasons)
    assert config.ranks.step_timeout_s == 60
