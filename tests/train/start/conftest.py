"""Settings of a small run, and what it loads."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from kdrl_train.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.start.load import Loaded, load


@pytest.fixture(scope="module")
def settings(folders: dict[str, Path]) -> TrainConfig:
    paths = {"policy": str(folders["student"]), "teacher": str(folders["teacher"])}
    model = ModelConfig(**paths, device="cpu")
    return TrainConfig(
        model=model,
        data=DataConfig(path=str(folders["task"])),
        sampling=SamplingConfig(max_new_tokens=32),
        reward=RewardConfig(workers=1),
    )


@pytest.fixture(scope="module")
def loaded_once(settings: TrainConfig) -> Loaded:
    return load(settings)


@pytest.fixture
def loaded(loaded_once: Loaded) -> Loaded:
    return copy.deepcopy(loaded_once)


@pytest.fixture
def held(settings: TrainConfig, tmp_path: Path) -> TrainConfig:
    """With held-out prompts of 4 and 9 tokens."""
    lines = ['{"question": "9+1=", "answer": "10"}', '{"question": "10+10+10=", "answer": "30"}']
    path = tmp_path / "held.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return replace(settings, eval=EvalConfig(data=DataConfig(path=str(path)), every=1))
