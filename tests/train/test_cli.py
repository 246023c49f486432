"""The command line: help, usage, and mistakes, each answered in one message."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest

from kdrl_train import cli
from kdrl_train.commands import COMMANDS
from kdrl_train.config import EvaluateConfig, TrainConfig
from kdrl_train.config_file import save_yaml, to_dict
from tests.train.options import parse, write


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in ("demo", "train", "eval", "check", "serve", "sft"))
    assert cli.main([]) == 2
    assert cli.main(["trian"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "command must be one of demo, train" in message
    assert message.endswith("got trian (did you mean train?)")


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help-all")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for section in to_dict(TrainConfig()).values():
        for name in section if isinstance(section, dict) else ():
            assert name.replace("_", "-") in out, name
    assert "--preset" in out
    assert "Longest completion, in tokens" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_short_help_is_short(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 50  # 80 columns; every preset is named
    for key in COMMANDS[command].options:
        assert f"  --{key.replace('_', '-')} " in out
    if COMMANDS[command].options:
        assert out.endswith(f"python -m kdrl_train {command} --help-all explains all options.\n")


def test_short_help_shows_defaults_of_preset_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    file = write(tmp_path / "run.yaml", "steps: 7\nmodel: {dtype: bfloat16}\n")
    with pytest.raises(SystemExit):
        parse("--preset", "kdrl_annealed", "--config", file, "-h")
    out = capsys.readouterr().out
    assert "Optimiser steps of the whole run (7)" in out
    assert "Precision of the models (bfloat16; or float32)" in out
    assert "at step 0 (0.005)" in out


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["eval", "--help-all"]])
def test_help_does_not_import_torch(argv: list[str]) -> None:
    script = f"""import sys
from kdrl_train.cli import main
try:
    main({argv})
except SystemExit:
    pass
sys.exit("torch" in sys.modules or "transformers" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert "usage: python -m kdrl_train" in done.stdout
    assert done.returncode == 0, done.stderr


def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for option, nearest in (
        ("--modle.policy", "--model.policy"),
        ("--learning-rate", "--optim.learning-rate"),
        ("--presett", "--preset"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", option, "x"])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert f"Unrecognized options: {option}" in error
        assert f" {nearest} " in error
        assert "train --help-all explains all options." in error
        assert "helptext" not in error
    with pytest.raises(SystemExit):
        cli.main(["report", "--x"])  # whose --help is whole
    assert "report --help " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "report", "replay", "plan"])
def test_help_offers_the_settings_of_a_run_where_they_are_taken(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help-all"])
    text = capsys.readouterr().out
    takes_runs = command not in ("demo", "report")
    assert ("recipe:NAME" in text) == ("the config.yaml of a run" in " ".join(text.split()))
    assert ("recipe:NAME" in text) == takes_runs


def test_a_wrong_option_names_its_whole_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--optim.learning-rate", "-1", "--steps", "0"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: steps must be at least 1, got 0",
        "optim.learning_rate must be greater than 0, got -1.0",
    ]
    assert cli.main(["train", "--optim.learning-rate", "1e38"]) == 1  # AdamW overflows
    error = capsys.readouterr().err
    assert error == "error: optim.learning_rate must be at most 1000000, got 1e+38\n"
    assert cli.main(["train", "--method.kd-coef.at", "3"]) == 1
    message = "method.kd_coef.values must be 1 numbers, one for each of at, got ()"
    assert message in capsys.readouterr().err


def test_an_error_is_one_message_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "run.yaml", "stepz: 3")
    assert cli.main(["train", "--config", file]) == 1
    assert "unknown key stepz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ("trian", 2, "error: command must be one of {}, got trian (did you mean train?)"),
        ("train --config", 2, "Missing value for argument '--config'"),
        ("train --preset", 2, "Missing value for argument '--preset'"),
        (
            "train --preset gsop",
            1,
            "exopd, constant_advantage, self_distillation, got gsop (did you",
        ),
        ("train --steps x", 2, "Error parsing --steps"),
        ("train steps 3", 2, "Unrecognized options: steps"),
        ("train --config {path}", 1, "--config must be a YAML file, got {path}: it is a folder"),
        ("train --config {path}/latin.yaml", 1, "latin.yaml: 'utf-8' codec can't decode byte"),
        ("train --config {path}/open.yaml", 1, "while parsing a flow sequence"),
        ("train --out {path}/latin.yaml", 1, "out must lead to a folder that can be written"),
        ("train --out {path}/latin.yaml/x", 1, "latin.yaml/x (Not a directory): choose another"),
        (
            "train --model.device gpu",
            1,
            "model.device must be auto, cpu, cuda or cuda:N, got 'gpu'",
        ),
        ("train --model.device cuda:99", 1, "model.device must be a GPU that torch sees, got cuda"),
        (
            "check --model.device gpu",
            1,
            "model.device must be auto, cpu, cuda or cuda:N, got 'gpu'",
        ),
        ("eval --out {path}", 1, "out must be a file, got {path}, which is a folder"),
        ("eval --out {path}/latin.yaml/x", 1, "out must lead to a folder that can be written"),
        ("report {path} --out {path}", 1, "out must be a file, got {path}, which is a folder"),
        ("sft --out {path}/latin.yaml/x", 1, "out must lead to a folder that can be written"),
        ("sft --out {path}/sft --device gpu", 1, "device must be auto, cpu, cuda or cuda:N, got"),
        ("demo --out {path}/latin.yaml/x", 1, "out must lead to a folder that can be written"),
        ("replay --file {path}/open.yaml", 1, "failed_step_XXXXXX.pt of a run folder, got {path}"),
        ("serve --port 99999", 1, "port must be at most 65535, got 99999"),
        (
            "serve --model.policy x",
            1,
            "--model.policy must be left out, got x: this command does not",
        ),
        ("serve --model.lora.rank 2", 1, "--model.lora.rank must be left out, got 2: this command"),
        (
            "eval --sampling.group-size 4",
            1,
            "--sampling.group-size must be left out, got 4: this command does not read it",
        ),
        (
            "eval --model.head-backward sketch",
            1,
            "--model.head-backward must be left out, got sketch",
        ),
        ("sft --data.teacher-column x", 1, "--data.teacher-column must be left out, got x: this"),
        (
            "sft --model x --architecture.hidden 64",
            1,
            "--architecture.hidden must be left out, got 64: nothing reads it, as model brings its",
        ),
        ("sft --tokenizer x --vocab-size 300", 1, "--vocab-size must be left out, got 300: noth"),
        (
            "train --preset grpo --model.teacher x",
            1,
            "--model.teacher must be left out, got x: nothing reads it, as method.kd is None",
        ),
        (
            "eval --greedy --samples 9",
            1,
            "--samples must be left out, got 9: nothing reads it, as greedy draws nothing",
        ),
        ("check --eval.samples 9", 1, "--eval.samples must be left out, got 9: nothing reads it"),
        ("plan --log.project mine", 1, "--log.project must be left out, got mine: nothing reads"),
    ],
)
def test_a_mistake_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, code: int, message: str
) -> None:
    """Before any model is loaded; what is wrong with a value of a file is tested above."""
    (tmp_path / "latin.yaml").write_bytes(b"out: \xff")
    (tmp_path / "open.yaml").write_text("a: [1\nb: 2\n", encoding="utf-8")
    try:
        ended = cli.main(argv.replace("{path}", str(tmp_path)).split())
    except SystemExit as stop:
        ended = stop.code
    assert ended == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "loading Pyth" not in line]
    expected = message.replace("{path}", str(tmp_path)).replace("{}", ", ".join(COMMANDS))
    assert expected in (" ".join(" ".join(lines).split()) if code == 2 else lines[0])
    assert code == 2 or len(lines) == 1, lines


@pytest.mark.parametrize(
    ("package", "argv", "extra"),
    [
        ("tyro", "--help", "train"),
        ("scipy", "report runs/first", "report"),
        ("transformers", "train --steps 1", "train"),
    ],
)
def test_a_missing_package_is_one_line_that_installs_it(
    package: str, argv: str, extra: str
) -> None:
    """As where kdrl-kernels is installed without the extra."""
    script = f"""import sys
sys.modules[{package!r}] = None
sys.argv = ["kdrl_train", *{argv.split()}]
from kdrl_train.__main__ import start
sys.exit(start())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if "loading Pyth" not in line]
    assert (done.returncode, len(lines)) == (1, 1), done.stderr
    assert f"error: the packages of the extra {extra} must be installed, got" in lines[0]
    assert lines[0].endswith(f": pip install 'kdrl-kernels[{extra}]'")


def test_what_a_command_does_not_read_may_stand_in_a_file(tmp_path: Path) -> None:
    """It may be that of a run; only who types it expects something of it."""
    spec = COMMANDS["eval"]
    file = write(tmp_path / "eval.yaml", "sampling: {group_size: 4}\nmodel: {policy: x}\n")
    argv = ["--config", file, "--samples", "2"]
    unread = dict.fromkeys(spec.unread, "nothing does")
    config = cli.parse(EvaluateConfig(), argv, "eval", spec.help, unread=lambda _: unread)
    assert (config.sampling.group_size, config.samples) == (4, 2)


@pytest.mark.parametrize("name", [name for name, spec in COMMANDS.items() if spec.unread])
def test_what_a_command_does_not_read_is_among_its_settings(name: str) -> None:
    spec = COMMANDS[name]
    module, _, kind = f"kdrl_train.{spec.settings}".rpartition(".")
    default = getattr(importlib.import_module(module), kind)()
    for key in spec.unread:
        attrgetter(key)(default)


@pytest.mark.parametrize("key", ["model.policy", "model.teacher", "data.path"])
def test_a_run_without_a_name_says_nothing_but_that(
    config: Callable[..., TrainConfig],
    capsys: pytest.CaptureFixture[str],
    key: str,
) -> None:
    """Its first line was "runs/train: training , on "."""
    settings = config()
    save_yaml(settings, settings.out.with_suffix(".yaml"))
    for command in ("train", "check"):
        argv = [command, "--config", str(settings.out.with_suffix(".yaml")), f"--{key}", " "]
        assert cli.main(argv) == 1
        out, err = capsys.readouterr()
        assert f"{key} must name a f" in " ".join((out + err).split())
        assert "training" not in out
    assert not settings.out.exists()
