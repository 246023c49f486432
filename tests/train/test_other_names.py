"""Names of TRL and verl: what a message says of a key or an option that is theirs."""

import re
from pathlib import Path

import pytest

import kdrl_train
from kdrl_train import cli
from kdrl_train.config import TrainConfig
from kdrl_train.config_file import update
from kdrl_train.other_names import NAMES, key_of
from kdrl_train.settings import keys_of

KEYS = keys_of(TrainConfig)


def test_names_stand_for_keys_that_there_are_and_are_none_themselves() -> None:
    assert [name for name, key in NAMES.items() if key not in KEYS] == []
    assert [name for name in NAMES if name in KEYS] == []


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("num_generations", "sampling.group_size"),
        ("learning_rate", "optim.learning_rate"),  # of another section
        ("path", None),  # of several
        ("temperature", None),
        ("bogus", None),
        ("beta", None),  # of the KL to the reference policy, which method.kd_coef is not
    ],
)
def test_key_of(name: str, key: str | None) -> None:
    assert key_of(name, KEYS) == key


def test_key_of_takes_the_end_of_a_key_where_the_section_is_another() -> None:
    assert key_of("lr", ["out", "learning_rate"]) == "learning_rate"
    assert key_of("lr", ["out"]) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lr": 1}}, "unknown key optim.lr (did you mean optim.learning_rate?); optim "),
        ({"learning_rate": 1}, "key learning_rate (did you mean optim.learning_rate?); there are "),
        ({"logger": 1}, "unknown key logger (did you mean log.trackers?); "),  # not log
        ({"optim": {"beta": 1}}, "unknown key optim.beta (did you mean betas?); "),
    ],
)
def test_a_file_with_such_a_key_is_refused_with_ours(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        update(TrainConfig(), values)


def test_an_option_is_refused_with_ours(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--num-generations 8 --a.rollout.n=8 --steps 3 --model.no-liger --bogus 1 --\x1blr 1"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *words.split(" ")])
    assert stop.value.code == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert " --num-generations: did you mean --sampling.group-size? " in error
    assert " --a.rollout.n: did you mean --sampling.group-size? " in error
    assert error.count("did you mean") == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--model.liger yes",
            "--model.liger takes no value: write --model.liger for true, --model.no-liger for ",
        ),
        ("--save-async=True", "write --save-async for true, --no-save-async for false\n"),
        ("--method.kd-coef 1e-3", "--method.kd-coef: did you mean --method.kd-coef.initial?\n"),
        ("--model.liger x --resume True", ""),
    ],
)
def test_a_switch_with_a_value_and_a_section_are_explained(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", *words.split()])
    error = capsys.readouterr().err
    assert line in error
    assert line or "takes no value" not in error


def test_the_table_of_the_readme_has_these_names() -> None:
    text = Path(kdrl_train.__file__).with_name("README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|(.*?)\|(.*?)\|(.*?)\|$", text.split("Coming from TRL")[1], re.M)[2:]
    assert len(rows) > 10
    for trl, verl, ours in rows:
        keys = re.findall(r"`([\w.]+)`", ours)
        assert [key for key in keys if key not in KEYS] == []
        for name in re.findall(r"`([\w.]+)`", trl + verl):
            known = name in {"path", "train_batch_size"}  # of many; beside another one
            assert known or key_of(name, KEYS) in keys, (name, keys)
