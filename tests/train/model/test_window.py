"""window: config.json of published models, and the context length that their model cards name."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from kdrl_train.model.window import window

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CASES: dict[str, tuple[str, int, dict[str, Any] | None, int]] = {
    # family, max_position_embeddings, rope_scaling, window
    "plain": ("qwen2", 32768, None, 32768),
    "Qwen2.5 with YaRN, as its card tells": ("qwen2", 32768, YARN, 131072),  # 4 * 32768
    "Qwen3 with YaRN, as its card tells": ("qwen3", 40960, YARN, 131072),
    "YaRN by its older name": (
        "qwen2",
        32768,
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        131072,
    ),
    "YaRN in both places": (
        "deepseek_v3",
        163840,
        {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        163840,
    ),
    "YaRN without the original": ("llama", 4096, {"rope_type": "yarn", "factor": 2.0}, 8192),
    "linear": ("llama", 2048, {"type": "linear", "factor": 4.0}, 8192),
    "dynamic": ("llama", 2048, {"type": "dynamic", "factor": 8.0}, 16384),
    "Llama 3.1": (
        "llama",
        131072,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        131072,
    ),
    "Gemma 3: its global layers alone": (
        "gemma3_text",
        131072,
        {"rope_type": "linear", "factor": 8.0},
        131072,
    ),
    "GPT-2: learnt positions": ("gpt2", 1024, None, 1024),
}


@pytest.mark.parametrize("name", CASES)
def test_the_window_is_that_of_the_model_card(name: str, tmp_path: Path) -> None:
    family, positions, rope, tokens = CASES[name]
    config = {"model_type": family, "max_position_embeddings": positions, "rope_scaling": rope}
    if family == "gpt2":
        config = {"model_type": family, "n_positions": positions}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert window(AutoConfig.from_pretrained(tmp_path)) == tokens


def test_longrope_names_the_extended_length() -> None:
    factors = [1.0] * 16
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    config = AutoConfig.for_model(
        "phi3",
        hidden_size=32 * 4,
        num_attention_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=rope | {"rope_theta": 1e4},
    )
    assert window(config) == 131072


def test_a_model_without_positions_has_no_window() -> None:
    assert window(AutoConfig.for_model("bloom")) is None
