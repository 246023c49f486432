"""known_policy: a resumed run has the tokenizer and the settings with which its weights learnt."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdrl_train.config import LoraConfig, TrainConfig
from kdrl_train.config.models import BASE_FILE, POLICY_FILE, SELF, teacher_file
from kdrl_train.config_file import to_dict
from kdrl_train.runfolder.resume import check_config
from kdrl_train.start.known_policy import check_policy, keep_policy
from tests.train.test_train import run, weights, without_times

Config = Callable[..., TrainConfig]


@pytest.fixture
def policy(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["student"], tmp_path / "policy")


def of(config: TrainConfig, policy: Path) -> TrainConfig:
    return replace(config, model=replace(config.model, policy=str(policy)))


def loaded(tokenizer: Any, ends: list[int], **added: int) -> Any:
    """Return what is read of a loaded run; added: more tokens of its tokenizer."""
    config = SimpleNamespace(eos_token_id=None)
    model = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=ends),
        config=SimpleNamespace(get_text_config=lambda: config),
    )
    tokens = SimpleNamespace(eos_token_id=0, get_vocab=lambda: tokenizer.get_vocab() | added)
    return SimpleNamespace(policy=SimpleNamespace(model=model), tokenizer=tokens)


@pytest.mark.fault("another policy")
def test_another_policy_of_the_same_shape_is_refused(
    config: Config, policy: Path, tokenizer: Any
) -> None:
    """Its tokens had other ids, or completions other ends, and nothing said so."""
    settings = of(config(), policy)
    settings.out.mkdir()
    same = loaded(tokenizer, [0, 7])
    keep_policy(settings, check_policy(settings, same))
    resumed = replace(settings, resume=True)
    assert check_policy(resumed, same) == json.loads((settings.out / POLICY_FILE).read_text())
    for other, message in (
        (
            loaded(tokenizer, [0]),
            r"\(eos_ids: \[0, 7\] before, \[0\] now\): restore it, or, where model",
        ),
        (loaded(tokenizer, [0, 7], new=258), r"\(tokenizer: \w{20} before, \w{20} now\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_policy(resumed, other)
        check_policy(settings, other)  # a new run has what it has
    file = policy / "config.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), "utf-8")
    message = r"got another one in .*policy \(config\.rms_norm_eps: 1e-06 before, 1e-05 now\)"
    with pytest.raises(ValueError, match=message):
        check_policy(resumed, same)
    for damaged in ("", "[]", "{}", "null"):
        (settings.out / POLICY_FILE).write_text(damaged)
        with pytest.raises(ValueError, match=r"where model\.policy is unchanged, delete"):
            check_policy(resumed, same)
    (settings.out / POLICY_FILE).unlink()  # as of an older version
    check_policy(resumed, same)


@pytest.mark.parametrize(
    ("changes", "file"),
    [
        ({"teacher": None}, POLICY_FILE),
        ({"teacher": None, "lora": LoraConfig(rank=2)}, BASE_FILE),
        ({"teacher": SELF}, teacher_file()),
        ({"reference": SELF}, teacher_file("reference")),
        ({"teacher": SELF, "self_teacher": "ema"}, POLICY_FILE),  # the checkpoint has it
    ],
)
def test_another_folder_is_taken_where_a_file_says_what_it_must_hold(
    config: Config, changes: dict[str, Any], file: str
) -> None:
    """Weights that no checkpoint has, of a base or a frozen teacher, went unnoticed."""
    settings = config()
    settings = replace(settings, model=replace(settings.model, **changes))
    settings.out.mkdir()
    place, moved = settings.out / "checkpoints/step_000001", of(settings, Path("moved"))
    (settings.out / POLICY_FILE).write_text("{}")
    (settings.out / file).write_text(json.dumps({"weights": "a"}))
    check_config(place, to_dict(settings), moved)
    if file == BASE_FILE:
        (settings.out / file).write_text(json.dumps({"weights": None}))
        with pytest.raises(ValueError, match=r"  model\.policy: .* before, moved now"):
            check_config(place, to_dict(settings), moved)
    (settings.out / file).unlink()
    with pytest.raises(ValueError, match=r"  model\.policy: .* before, moved now"):
        check_config(place, to_dict(settings), moved)
    check_config(place, to_dict(settings), settings)


@pytest.mark.slow
def test_a_run_goes_on_with_its_policy_in_another_folder(
    config: Config, policy: Path, tmp_path: Path
) -> None:
    whole, parts = (of(config(out, steps=2, save_every=1), policy) for out in ("whole", "parts"))
    expected = run(whole)
    run(replace(parts, steps=1))
    moved = of(parts, policy.rename(tmp_path / "moved"))
    assert without_times(run(replace(moved, resume=True))) == without_times(expected)
    theirs = weights(whole.out / "model")
    for name, tensor in weights(parts.out / "model").items():
        assert torch.equal(tensor, theirs[name]), name
