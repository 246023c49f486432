"""Soft cap and scale of transformers' families, in the one order that a head of ours has."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdrl_kernels.head_config import head_scalars, logit_scale


def _config(model_type: str = "llama", **values: Any) -> Any:
    return SimpleNamespace(model_type=model_type, **values)


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
