"""Soft cap and scale of transformers' families, in the one order that a head of ours has."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from kdrl_kernels.head_config import (
    DIVISORS,
    FACTORS,
    SOFTCAPS,
    head_scalars,
    logit_scale,
    require_head_alone,
)

NAME = re.compile(r"^ +(\w*(?:logit|lm_head|unpadded|output_mult)\w*) *[:=]", re.MULTILINE)
HARMLESS = re.compile(
    r"att(?:entio)?n_|router|_init|max_logit_scale|num_logits_to_keep|contrastive|lsd_time"
    r"|output_auxiliary_logits|average_logits_per_cell|chunk_size_lm_head|freeze_lm_head"
    r"|lm_head_bias"
)
"""Names that change no logits of a language model, or that its head's parameters tell."""


def _config(model_type: str = "llama", **values: Any) -> Any:
    return SimpleNamespace(model_type=model_type, vocab_size=128, **values)


def test_every_name_of_the_head_in_transformers_is_read() -> None:
    folder = Path(transformers.__file__).parent / "models"
    names = {
        name
        for file in folder.glob("*/configuration_*.py")
        for name in NAME.findall(file.read_text(encoding="utf-8"))
    }
    read = {*SOFTCAPS, *FACTORS, *DIVISORS, "unpadded_vocab_size"}
    assert {"logit_scale", "logits_scaling", "final_logit_softcapping"} <= names
    assert {name for name in names - read if not HARMLESS.search(name)} == set()


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (_config(), 1.0),
        (_config(logit_scale=0.25), 0.25),
        (_config(logit_scale=None), 1.0),
        (_config(lm_head_multiplier=2.0), 2.0),
        (_config("muse_glimmer_text", output_multiplier=0.5), 0.5),
        (_config("granite", logits_scaling=4.0), 0.25),
        (_config("hyperclovax", logits_scaling=4.0), 4.0),
        (_config("inkling_text", logits_mup_width_multiplier=24.0), 1 / 24),
        (_config("mpt", logit_scale="inv_sqrt_d_model"), 1.0),
    ],
    ids=str,
)
def test_scale_of_a_family(config: Any, scale: float) -> None:
    assert logit_scale(config) == scale
    assert head_scalars(config, 0.5) == (0.5 / scale, None)


@pytest.mark.parametrize(
    "name", ["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"]
)
def test_the_cap_comes_after_the_scale(name: str) -> None:
    scale, cap, sampled_at = 0.3, 1.5, 0.7
    config = _config(logit_scale=scale, **{name: cap})
    temperature, softcap = head_scalars(config, sampled_at)
    product = torch.linspace(-9, 9, 40, dtype=torch.float64)
    logits = cap * torch.tanh(scale * product / cap)
    assert softcap is not None
    ours = softcap * torch.tanh(product / softcap) / temperature
    torch.testing.assert_close(ours, logits / sampled_at, rtol=1e-12, atol=0)


def test_no_cap_is_none() -> None:
    config = _config(final_logit_softcapping=None, logits_soft_cap=0)
    assert head_scalars(config) == (1.0, None)


def test_rows_without_a_logit_are_refused() -> None:
    config = _config("inkling_text", unpadded_vocab_size=100)
    with pytest.raises(
        ValueError, match=r"got unpadded_vocab_size 100 of 128 rows .* inkling_text"
    ):
        head_scalars(config)
    config.unpadded_vocab_size = 128
    assert head_scalars(config) == (1.0, None)


def _small(model_type: str, **settings: Any) -> Any:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, **sizes, intermediate_size=16, **settings)
    return AutoModelForCausalLM.from_config(config)


def test_layers_between_backbone_and_head_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"backbone alone, got BertLMHeadModel with cls.* 3 more w"
    ):
        require_head_alone(_small("bert", is_decoder=True))
    require_head_alone(_small("phi"))  # its head has a bias
    require_head_alone(_small("qwen2", tie_word_embeddings=True))
