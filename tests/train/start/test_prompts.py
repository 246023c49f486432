"""Prompts before the first step: what they hold, whether they fit, and what ends a completion."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdrl_train.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.model.policy import Policy
from kdrl_train.start import prompts
from kdrl_train.start.load import Loaded, load


@pytest.fixture
def config(folders: dict[str, Path]) -> TrainConfig:
    paths = {"policy": str(folders["student"]), "teacher": str(folders["teacher"])}
    model = ModelConfig(**paths, device="cpu")
    return TrainConfig(
        model=model,
        data=DataConfig(path=str(folders["task"])),
        sampling=SamplingConfig(max_new_tokens=32),
        reward=RewardConfig(workers=1),
    )


@pytest.fixture
def loaded(config: TrainConfig) -> Loaded:
    return load(config)


def test_another_vocabulary_is_named_by_its_first_token(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match=r"token 258 is None for the policy and '<extra>' for the"):
        prompts.check_tokenizers(tokenizer, other)
    assert prompts.check_tokenizers(tokenizer, copy.deepcopy(tokenizer)) == "the same 258 tokens"


def test_ends_of_sequence_must_agree(loaded: Loaded, tiny: Callable[..., Any]) -> None:
    assert prompts.check_eos(loaded) == "[0] ['<|endoftext|>']"
    loaded.teacher.model.generation_config.eos_token_id = [0, 7]
    with pytest.raises(ValueError, match=r"the teacher must end sequences .* got \[7\]"):
        prompts.check_eos(loaded)
    masked = "[0] ['<|endoftext|>']; the teacher also ends with [7], so ends are not distilled"
    assert prompts.check_eos(loaded, "mask") == masked
    loaded.policy.model.generation_config.eos_token_id = [0, 7]
    assert prompts.check_eos(loaded).startswith("[0, 7]")
    model = tiny("llama")
    model.generation_config.eos_token_id = 9
    alone = replace(loaded, teacher=None, policy=Policy(model, TrainConfig().method))
    with pytest.raises(
        ValueError, match=r"got 0 \('<\|endoftext\|>'\) from its tokenizer and \[9\]"
    ):
        prompts.check_eos(alone)


def test_prompts_must_fit(config: TrainConfig, loaded: Loaded) -> None:
    assert prompts.check_prompts(config, loaded).startswith("20 problems, 4 to 4 tokens, without")
    short = replace(config, data=replace(config.data, max_prompt_tokens=3))
    with pytest.raises(ValueError, match=r"task\.jsonl:1"):
        prompts.check_prompts(short, loaded)
    long = replace(config, sampling=SamplingConfig(max_new_tokens=253))
    with pytest.raises(ValueError, match=r"a window of 256 tokens for 4 \+ 253: lower"):
        prompts.check_prompts(long, loaded)


def test_held_out_prompts_must_fit(config: TrainConfig, tmp_path: Path) -> None:
    lines = ['{"question": "1+1=", "answer": "2"}', '{"question": "10+10+10=", "answer": "30"}']
    path = tmp_path / "held.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    evaluation = EvalConfig(data=DataConfig(path=str(path)), every=1)
    held = replace(config, eval=evaluation)
    loaded = load(held)
    assert "20 problems, 4 to 4 tokens, 2 held out of at most 9," in prompts.check_prompts(
        held, loaded
    )
    data = replace(evaluation.data, max_prompt_tokens=8)
    short = replace(held, eval=replace(evaluation, data=data))
    with pytest.raises(ValueError, match=r"in eval\.data: prompt held\.jsonl:2 .* 8 tokens, got 9"):
        prompts.check_prompts(short, loaded)
    long = replace(held, sampling=SamplingConfig(max_new_tokens=250))
    with pytest.raises(ValueError, match=r"model\.policy must .* 256 tokens for 9 \+ 250: lower"):
        prompts.check_prompts(long, loaded)
    first = replace(held, eval=replace(evaluation, max_problems=1))
    assert len(load(first).held_out) == 1
    assert load(replace(held, eval=replace(evaluation, every=0))).held_out == []
