"""The settings of several rewards: in a file, as options, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from kdrl_train.config import RewardConfig, TrainConfig
from kdrl_train.config_file import load_yaml, save_yaml, to_dict, update
from kdrl_train.method.presets import PRESETS
from kdrl_train.runfolder.resume import check_config
from tests.train.options import parse, write

FORMAT = "{function: 'tests.train.scripted_rewards:short', weight: 1e-1, name: format}"


def test_rewards_are_a_list_in_a_file_and_words_as_options(tmp_path: Path) -> None:
    config = parse("--reward.functions", "math", FORMAT)
    parts = config.reward.parts
    assert [(part.label, part.weight) for part in parts] == [("math", 1.0), ("format", 0.1)]
    assert config.reward.deciding == parts[0]
    assert not config.reward.builtin
    save_yaml(config, tmp_path / "config.yaml")
    assert update(TrainConfig(), load_yaml(tmp_path / "config.yaml")) == config
    file = str(tmp_path / "config.yaml")
    assert parse("--config", file) == config
    assert parse("--config", file, "--reward.functions", "exact").reward.parts[0].label == "exact"
    short = write(tmp_path / "short.yaml", f"reward: {{functions: [math, {FORMAT}]}}")
    assert parse("--config", short) == config


def test_one_reward_is_the_only_part() -> None:
    (part,) = RewardConfig(function="my.module:bonus").parts
    assert (part.function, part.weight, part.label) == ("my.module:bonus", 1.0, "bonus")
    assert RewardConfig(function="m:" + "x" * 99).parts[0].label == "reward"
    assert RewardConfig().builtin


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{weight: 2}]", r"reward\.functions\[0\]\.function must be given, got"),
        (
            "[math, {function: exact, wait: 2}]",
            r"unknown key reward\.functions\[1\]\.wait \(did you mean weight\?\); "
            r"reward\.functions\[1\] has function, weight",
        ),
        ("[{function: math, weight: x}]", r"functions\[0\]\.weight must be a number, got 'x'"),
        ("[{function: math, weight: .nan}]", r"functions\[0\]\.weight must be a finite number"),
        ("['{function']", r"functions\[0\]\.function must be a name, or stand among keys"),
        ("[math, math]", r"reward\.functions must have different names, got math twice: set name"),
        ("['my:a b']", r"functions\[0\]\.name must be 1 to 40 letters, .*, got 'a b' of my:a b"),
        ("['my:overlong']", r"functions\[0\]\.name must .*, and not overlong, got 'overlong'"),
        (
            "[{function: math, decides: true}, {function: exact, decides: true}]",
            r"reward\.functions must have one that decides, got math, exact: mark one of them",
        ),
        ("[3]", r"reward\.functions\[0\] must hold keys and values, got 3"),
    ],
)
def test_wrong_rewards_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"reward: {{functions: {text}}}", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse("--config", str(file))


def test_function_and_functions_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^reward\.function must be left out where functions are"):
        parse("--reward.function", "exact", "--reward.functions", "math")


def test_rewards_that_are_only_measured_make_no_policy_gradient() -> None:
    only = RewardConfig(functions=({"function": "math", "weight": 0.0},))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^reward\.functions must have one with a weight other"):
        TrainConfig(reward=only, method=PRESETS["grpo"])
    for name in ("kd_rkl", "reward_shaping", "constant_advantage"):
        assert TrainConfig(reward=only, method=PRESETS[name]).reward == only
    fined = replace(only, overlong_buffer=4)
    assert TrainConfig(reward=fined, method=PRESETS["grpo"]).reward == fined


@pytest.mark.fault("hostile config or data")
def test_a_file_lists_no_function_of_an_installed_module(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("reward: {functions: [math, {function: 'os:popen'}]}", encoding="utf-8")
    message = r"^reward\.functions in .*run\.yaml must be .* got os:popen, of an installed package"
    for options in ((), ("--reward.function", "math"), ("--reward.workers", "1")):
        with pytest.raises(ValueError, match=message):
            parse("--config", str(file), *options)
    typed = parse("--config", str(file), "--reward.functions", "exact", "os:popen")
    assert [part.function for part in typed.reward.parts] == ["exact", "os:popen"]
    assert parse("--config", str(file), "--reward.functions").reward == RewardConfig()


def test_a_resumed_run_keeps_its_rewards(tmp_path: Path) -> None:
    config = replace(TrainConfig(), reward=RewardConfig(functions=("math", FORMAT)))
    saved = to_dict(config)
    check_config(tmp_path, saved, config)
    for other in (RewardConfig(), RewardConfig(functions=("math", "exact"))):
        with pytest.raises(ValueError, match=r"reward\.functions: "):
            check_config(tmp_path, saved, replace(config, reward=other))
    older = to_dict(TrainConfig())
    for name in ("functions", "overlong_buffer", "overlong_penalty"):
        del older["reward"][name]
    check_config(tmp_path, older, TrainConfig())
    with pytest.raises(ValueError, match=r"reward\.overlong_buffer: 0 before, 4 now"):
        check_config(tmp_path, older, TrainConfig(reward=RewardConfig(overlong_buffer=4)))
