"""base_model: adapters of a run's best checkpoint belong to its base, too."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kdrl_train.config import LoraConfig, TrainConfig
from kdrl_train.start.base_model import FILE, check_base, keep_base


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
    assert check_base(settings) == json.loads((first.out / FILE).read_text("utf-8"))
    other = replace(settings.model, policy=str(folders["other_teacher"]))
    with pytest.raises(ValueError, match=r"weights that the adapters of .*first were trained on"):
        check_base(replace(settings, model=other))
