"""base_model: adapters are trained on and measured with the base that they belong to."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kdrl_train.config import LoraConfig, ModelConfig, TrainConfig
from kdrl_train.config.models import BASE_FILE
from kdrl_train.runfolder.checkpoint import Checkpoint
from kdrl_train.start import base_model
from kdrl_train.start.base_model import check_base, keep_base


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that trained adapters of BASE; a folder's weights hash to its name."""

    def read(folder: Path) -> Checkpoint:
        return Checkpoint(folder, 3, {"model": {"policy": "BASE"}}, {}, {})

    monkeypatch.setattr(base_model, "read", read)
    monkeypatch.setattr(base_model, "base_of", lambda policy: policy)
    monkeypatch.setattr(base_model, "weights_hash", lambda name: Path(name).name)
    (tmp_path / BASE_FILE).write_text(json.dumps({"base": "BASE", "weights": "BASE"}))
    return tmp_path


def test_adapters_are_put_on_their_base_and_not_on_what_their_run_has_merged(run: Path) -> None:
    """They were added to the merged model a second time, with a warning alone."""
    weights = run / "checkpoints" / "step_000003"
    adapted = ModelConfig(lora=LoraConfig(rank=4), weights=weights, policy=str(run / "model"))
    for name, policy in (("model", "BASE"), ("adapter", "BASE"), ("../copies/BASE", None)):
        config = replace(adapted, policy=str(run / name))
        assert base_model.model_of_adapters(config).policy == (policy or config.policy)
    moved = replace(adapted, policy="elsewhere/model")
    with pytest.raises(ValueError, match=r"^model\.policy must have the weights that the adapters"):
        base_model.model_of_adapters(moved)
    whole = ModelConfig(policy=str(run / "model"), weights=weights)
    assert base_model.model_of_adapters(whole) == whole


@pytest.mark.parametrize("name", ["checkpoints/step_000001", "best.json"])
def test_the_base_of_other_adapters_is_compared(
    config: Callable[..., TrainConfig], folders: dict[str, Path], name: str
) -> None:
    first, second = (
        replace(one, model=replace(one.model, lora=LoraConfig(rank=2)))
        for one in (config("first"), config("second"))
    )
    (first.out / "checkpoints" / "step_000001").mkdir(parents=True)
    best = {"step": 1, "score": 0.5}
    content = {"checkpoint": "checkpoints/step_000001", "best": best, "previous": None}
    (first.out / "best.json").write_text(json.dumps(content | {"measured": {}}), "utf-8")
    keep_base(first, check_base(first))
    settings = replace(second, model=replace(second.model, weights=first.out / name))
    assert check_base(settings) == json.loads((first.out / BASE_FILE).read_text("utf-8"))
    other = replace(settings.model, policy=str(folders["other_teacher"]))
    with pytest.raises(ValueError, match=r"weights that the adapters of .*first were trained on"):
        check_base(replace(settings, model=other))
