"""config and config_file: who overrides whom, and what is saved."""

import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import yaml

from kdrl_train.config import (
    DataConfig,
    EvaluateConfig,
    OptimConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.config_file import differences, load_yaml, save_yaml, to_dict, update
from kdrl_train.method.config import ScheduleConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.settings import explanations, is_settings
from tests.train.options import parse, write


@pytest.mark.fault("hostile config or data")
@pytest.mark.parametrize(
    "name", ["antigravity:fly_to", "os:popen", "yaml:safe_load", "torch.hub:load"]
)
def test_a_file_of_settings_imports_no_installed_module(name: str, tmp_path: Path) -> None:
    """Whoever writes the file would choose code of this machine; a person who types it may."""
    file = write(tmp_path / "run.yaml", f"reward: {{function: '{name}'}}")
    refusal = rf"function in .*run\.yaml must be .*, got {name}, .*pass --reward\.function {name}"
    for options in ((), ("--reward.workers", "1")):
        with pytest.raises(ValueError, match=refusal):
            parse("--config", file, *options)
    assert parse("--config", file, f"--reward.function={name}").reward.function == name


@pytest.mark.fault("hostile config or data")
def test_a_file_of_settings_imports_no_loss_of_an_installed_module(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "method: {loss: 'torch.hub:load', kd: null}")
    with pytest.raises(ValueError, match=r"method\.loss in .*run\.yaml must be a function in"):
        parse("--config", file)
    assert parse("--config", file, "--method.loss", "torch.hub:load").method.kd is None
    users = write(tmp_path / "users.yaml", "method: {loss: 'tests.train.own_losses:kdrl'}")
    assert parse("--config", users).method.loss == "tests.train.own_losses:kdrl"


@pytest.mark.parametrize("name", ["exact", "tests.train.scripted_rewards:early_bytes", "absent:f"])
def test_a_file_of_settings_names_a_reward_of_the_users_own(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", f"reward: {{function: '{name}'}}")
    assert parse("--config", file).reward.function == name


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


@pytest.mark.parametrize(
    ("options", "resume"),
    [
        ((), False),
        (("--resume",), True),
        (("--resume", "--steps", "3"), True),
        (("--resume", "auto"), "auto"),
        (("--resume=auto", "--seed", "3"), "auto"),
        (("--resume", "auto", "--no-resume"), False),
    ],
)
def test_resume_needs_no_value(options: tuple[str, ...], resume: bool | str) -> None:
    assert parse(*options).resume == resume


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


def test_a_mapping_is_set_by_a_file_or_by_one_option(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "data: {template_arguments: {thinking: false, n: [1]}}")
    config = parse("--config", file)
    assert config.data.template_arguments == {"thinking": False, "n": [1]}
    assert parse("--config", file, "--seed", "1").data == config.data
    option = "--data.template-arguments"
    replaced = parse("--config", file, option, "{effort: low}")  # the whole of it
    assert replaced.data.template_arguments == {"effort": "low"}
    split = parse(option, "{effort:", "low,", "n:", "1}", "--seed", "1")  # without quotes
    assert split.data.template_arguments == {"effort": "low", "n": 1}
    save_yaml(config, tmp_path / "config.yaml")
    assert parse("--config", str(tmp_path / "config.yaml")) == config


def test_any_number_of_trackers(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "log: {trackers: [wandb, tensorboard]}\n")
    assert parse("--config", file).log.trackers == ("wandb", "tensorboard")
    assert parse("--config", file, "--log.trackers", "trackio").log.trackers == ("trackio",)
    assert parse().log.trackers == ()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_an_option(name: str) -> None:
    assert parse("--preset", name).method == PRESETS[name]


def test_null_and_empty_files(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path / "a.yaml", "method: {kd: null}")).method.kd is None
    assert parse("--config", write(tmp_path / "b.yaml", "")) == TrainConfig()
    with pytest.raises(ValueError, match="there is no such file"):
        parse("--config", str(tmp_path / "absent.yaml"))


def test_differences_name_nested_keys() -> None:
    old, new = to_dict(TrainConfig()), to_dict(replace(TrainConfig(), seed=1))
    new["optim"] = new["optim"] | {"learning_rate": 1.0, "extra": 2}
    assert differences(old, new) == {
        "seed": (0, 1),
        "optim.learning_rate": (1e-6, 1.0),
        "optim.extra": ("absent", 2),
    }


def test_every_number_and_switch_says_what_it_takes() -> None:
    """pydantic would read "3" as the number 3, and 1 as True, for a field of a plain type."""
    classes = [TrainConfig, EvaluateConfig]
    for cls in classes:
        for name, kind in get_type_hints(cls, include_extras=True).items():
            if is_settings(kind):
                classes += [kind] if kind not in classes else []
            plain = {kind, *get_args(kind)} & {int, float, bool}
            assert get_origin(kind) is Annotated or not plain, (cls, name)
            assert explanations(cls)[name], (cls, name)
    assert len(classes) == 15


def test_settings_are_checked_values(tmp_path: Path) -> None:
    config = TrainConfig(out=tmp_path, optim=OptimConfig(betas=(0.8, 0.9)))
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, replace(config), replace(config, seed=1)}) == 2
    with pytest.raises(FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"^steps must be at least 1, got 0$"):
        replace(config, steps=0)
    with pytest.raises(ValueError, match=r"^unknown key stepz \(did you mean steps\?\)"):
        TrainConfig(stepz=3)  # type: ignore[call-arg]


def test_yaml_is_plain(tmp_path: Path) -> None:
    save_yaml(TrainConfig(), tmp_path / "config.yaml")
    content = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert content["out"] == str(Path("runs/train"))
    assert content["optim"]["betas"] == [0.9, 0.999]


def test_steps_that_are_kept_are_saved() -> None:
    settings = TrainConfig(steps=9, save_every=4, keep_every=6)
    assert [step for step in range(1, 10) if settings.is_saved(step)] == [4, 6, 8, 9]
    assert [s for s in range(1, 10) if TrainConfig(steps=9, save_every=4).is_saved(s)] == [4, 8, 9]
