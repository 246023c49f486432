"""KdrlConfig: parsed as TRL's own fields are, checked by the settings that it fills."""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, TrlParser

import kdrl_kernels as kk
from kdrl_kernels.integrations import trl
from kdrl_kernels.integrations.trl import KdrlConfig
from kdrl_kernels.integrations.trl import config as module
from kdrl_train.method.config import MethodConfig, ScheduleConfig

pytestmark = pytest.mark.filterwarnings(
    # TRL's own default of gradient_checkpointing, an old name in transformers 5
    "ignore:.gradient_checkpointing. is deprecated:FutureWarning"
)

NEW = {one.name for one in fields(KdrlConfig)} - {one.name for one in fields(GRPOConfig)}


def config(folder: Path, **options: Any) -> KdrlConfig:
    return KdrlConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **options)


def test_defaults_are_those_of_objective_and_method(tmp_path: Path) -> None:
    args = config(tmp_path)
    assert args.objective() == kk.Objective(kd_coef=1.0)
    assert args.objective("off") == kk.Objective(policy="off", kd_coef=1.0)
    assert args.method() == MethodConfig()
    assert args.sketch_threshold == kk.Sketch().threshold
    assert args.kd_coef == kk.Objective().kd_coef == ScheduleConfig().initial


def test_every_option_reaches_objective_or_method(tmp_path: Path) -> None:
    options = {"kd": "k3", "k3_bound": 5.0, "kd_ratio_cap": 3.0, "kd_mask": "wrong"}
    args = config(tmp_path, epsilon=0.1, epsilon_high=0.3, kd_eos="mask", kd_coef=0.5, **options)
    assert args.objective() == kk.Objective(
        clip_low=0.1, clip_high=0.3, kd="k3", kd_coef=1.0, k3_bound=5.0, kd_ratio_cap=3.0
    )
    schedule = ScheduleConfig(initial=0.5)
    assert args.method() == MethodConfig(kd_coef=schedule, kd_mask="wrong", kd_eos="mask")
    assert config(tmp_path, kd="rkl+fkl", fkl_share=0.25).objective().fkl_share == 0.25
    assert config(tmp_path, kd="jsd", jsd_alpha=0.25).objective().jsd_alpha == 0.25
    assert config(tmp_path, kd_baseline="kl").objective().kd_baseline == "kl"
    topk = config(tmp_path, kd="topk_rkl", kd_topk=8, tail=False)
    assert topk.objective().topk_kd == "topk_rkl"
    assert not topk.objective().tail


def test_no_teacher(tmp_path: Path) -> None:
    args = config(tmp_path, kd=None)
    assert args.objective() == kk.Objective(kd=None, kd_coef=1.0)
    assert args.method().kd is None
    assert config(tmp_path, kd="none").kd is None


@pytest.mark.parametrize("as_text", [False, True])
def test_a_schedule_is_a_dict_or_json(tmp_path: Path, as_text: bool) -> None:
    values = {"kind": "step", "at": [2, 5], "values": [0.5, 0.25]}
    schedule: Any = json.dumps(values) if as_text else values
    args = config(tmp_path, kd_coef=0.75, kd_coef_schedule=schedule)
    expected = ScheduleConfig(kind="step", initial=0.75, at=(2, 5), values=(0.5, 0.25))
    assert args.schedule() == args.method().kd_coef == expected
    assert config(tmp_path, kd_coef_schedule={"initial": 0.5}).schedule().initial == 0.5
    assert values == {"kind": "step", "at": [2, 5], "values": [0.5, 0.25]}


def test_the_command_line_parses_every_option(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu", "--bf16", "false"]
    parser = TrlParser([KdrlConfig])
    (args,) = parser.parse_args_and_config(words)
    assert {name: getattr(args, name) for name in NEW} == {
        one.name: one.default for one in fields(KdrlConfig) if one.name in NEW
    }
    words += ["--kd", "topk_fkl", "--kd_topk", "8", "--tail", "false", "--kd_coef", "0.5"]
    words += ["--kd_coef_schedule", '{"kind": "linear", "final": 0.25, "steps": 4}']
    words += ["--kd_mask", "wrong", "--right_above", "0.75", "--kd_ratio_cap", "inf"]
    words += ["--teacher_model_init_kwargs", '{"dtype": "float32"}']
    (args,) = parser.parse_args_and_config(words)
    assert (args.kd, args.kd_topk, args.tail, args.right_above) == ("topk_fkl", 8, False, 0.75)
    assert args.schedule() == ScheduleConfig(kind="linear", initial=0.5, final=0.25, steps=4)
    assert args.kd_ratio_cap == float("inf")
    assert args.teacher_model_init_kwargs == {"dtype": "float32"}


def test_a_settings_file_may_hold_a_schedule(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nreport_to: none\nuse_cpu: true\nbf16: false\nkd: k3\n"
        "kd_coef_schedule:\n  kind: cosine\n  initial: 1e-2\n  final: 0.0\n  steps: 7\n"
    )
    (args,) = TrlParser([KdrlConfig]).parse_args_and_config(["--config", str(file)])
    assert args.schedule() == ScheduleConfig(kind="cosine", initial=0.01, final=0.0, steps=7)


def test_every_option_has_a_help() -> None:
    texts = {one.name: one.metadata.get("help", "") for one in fields(KdrlConfig)}
    assert all(len(texts[name]) > 20 for name in NEW)
    assert all("%" not in texts[name] for name in NEW)  # argparse would format it


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kd": "reward"}, r"kd must not be 'reward': TRL computes advantages .* use kd='k2'"),
    ({"kd": "k1"}, r"kd must not be 'k1': k1 as a loss"),
    ({"kd": "kl"}, r"kd must be one of .*, got 'kl'"),
    ({"kd": None, "kd_coef": 0.5}, r"kd must be set with kd_coef=0\.5, got None"),
    ({"kd": None, "kd_mask": "wrong"}, r"kd must be set with kd_mask='wrong', got None"),
    ({"kd": "rkl", "kd_baseline": "kl"}, r"kd_baseline must be None for kd='rkl', got 'kl'"),
    ({"kd_coef": -1.0}, r"kd_coef must be at least 0, got -1\.0"),
    ({"kd_coef_schedule": {"initial": -1.0}}, r"kd_coef_schedule\.initial must be at least 0"),
    ({"kd_coef_schedule": {"kind": "sine"}}, r"kd_coef_schedule\.kind must be .*, got 'sine'"),
    ({"kd_coef_schedule": {"kind": "cosine"}}, r"\.final must differ .*, got 0\.002 for both"),
    ({"kd_coef_schedule": {"begin": 1}}, r"unknown key kd_coef_schedule\.begin"),
    ({"kd_coef_schedule": {"kind": "step"}}, r"kd_coef_schedule\.at must be one or more"),
    ({"kd_coef_schedule": {"initial": 0.1}, "kd_coef": 0.2}, r"kd_coef must be left out where"),
    ({"kd_coef_schedule": "linear"}, r"must be a dict, its JSON or None, got 'linear'; for inst"),
    ({"kd_coef_schedule": "{'kind'}"}, r"kd_coef_schedule must be a dict, its JSON or None"),
    ({"kd_mask": "right"}, r"kd_mask must be 'none', 'wrong' or 'wrong_group', got 'right'"),
    ({"kd_eos": "drop"}, r"kd_eos must be 'keep' or 'mask', got 'drop'"),
    ({"kd_ratio_cap": 0.0}, r"kd_ratio_cap must be positive, got 0\.0"),
    ({"kd": "k3", "k3_bound": 90.0}, r"k3_bound must be in \(0, 60\], got 90\.0"),
    ({"k3_bound": 10.0}, r"k3_bound must be 20\.0 for kd='k2', got 10\.0: only 'k3' and"),
    ({"jsd_alpha": 0.1}, r"jsd_alpha must be 0\.5 for kd='k2', got 0\.1: only 'jsd' and"),
    ({"fkl_share": 0.1}, r"fkl_share must be 0\.5 for kd='k2', got 0\.1"),
    ({"tail": False}, r"tail must be True for kd='k2', got False"),
    ({"kd_topk": 8}, r"kd_topk must be 64 for kd='k2', got 8"),
    ({"kd": "topk_fkl", "kd_topk": 0}, r"kd_topk must be in 1 to 512, got 0"),
    ({"right_above": 0.9}, r"right_above must be 0\.5 for kd_mask='none', got 0\.9"),
    ({"head_backward": "fast"}, r"head_backward must be one of .*, got 'fast'"),
    ({"sketch_threshold": 0.1}, r"head_backward must be 'sketch' with sketch_threshold=0\.1"),
    (
        {"head_backward": "sketch", "sketch_threshold": 2.0},
        r"sketch_threshold must be in \[2\^-24, 1\], got 2\.0",
    ),
    ({"teacher_api": "rest"}, r"teacher_api must be one of .*, got 'rest'"),
    ({"teacher_model_init_kwargs": "auto"}, r"teacher_model_init_kwargs must be a dict"),
    ({"tail": 1}, r"tail must be True or False, got 1"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(list(w[0])) for w in WRONG])
def test_a_wrong_option_is_refused_in_one_line(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        config(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_right_above_is_for_a_mask_or_an_adaptive_schedule(tmp_path: Path) -> None:
    assert config(tmp_path, kd_mask="wrong", right_above=0.9).judges
    adaptive = {"kind": "reward_adaptive"}
    assert config(tmp_path, kd_coef_schedule=adaptive, right_above=0.9).judges
    assert not config(tmp_path).judges


def test_a_clip_range_that_objective_has_not_is_named_as_in_trl(tmp_path: Path) -> None:
    args = config(tmp_path, epsilon=1.5)
    assert args.objective("off").kd == "k2"
    with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\), got 1\.5"):
        args.objective()


def test_the_guide_lists_every_option_with_its_default() -> None:
    text = Path(trl.__file__).with_name("README.md").read_text(encoding="utf-8")
    section = text.split("## KdrlTrainer")[1].split("\n## ")[0]
    table = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, flags=re.MULTILINE))
    defaults = {one.name: one.default for one in fields(KdrlConfig) if one.name in NEW}
    assert {name: ast.literal_eval(value) for name, value in table.items()} == defaults


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kd": "k2"}, None),
        ({"kd": "k2", "temperature": 0.7}, None),
        ({"kd": "k2", "top_p": 0.9, "min_p": 0.1}, "top_p=0.9 and min_p=0.1"),
        ({"kd": "k3", "top_k": 20}, "top_k=20"),
        ({"kd": "k3_ratio", "repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"kd": "k2", "generation_kwargs": {"temperature": 0.5}}, "temperature=0.5"),
        ({"kd": "rkl", "top_p": 0.9}, None),
    ],
    ids=str,
)
def test_a_sampler_of_another_distribution_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], named: str | None
) -> None:
    """A sampled kind has the gradient of a KL where tokens come from the loss's distribution."""
    warnings: list[str] = []
    monkeypatch.setattr(
        module.logger, "warning", lambda text, *values: warnings.append(text % values)
    )
    module.check_sampler(config(tmp_path, **options))
    assert [f"got {named}:" in text for text in warnings] == [True] * (named is not None)
