"""Runs with adapters: they resume, sample, export, and start others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdrl_train.config import EngineConfig, LogConfig, LoraConfig, OptimConfig, TrainConfig
from kdrl_train.runfolder.checkpoint import read
from tests.train.conftest import EXACT
from tests.train.test_train import run, without_times
from tests.train.test_two_ranks import alone, assert_same_metrics, together

# peft 0.21 reads an attribute that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
Config = Callable[..., TrainConfig]
ADAPTERS = LoraConfig(rank=4, alpha=8.0, targets=("all-linear", "lm_head"))
OPTIM = OptimConfig(learning_rate=3e-3, micro_batch_tokens=64)


def of(config: Config, out: str, lora: LoraConfig = ADAPTERS, **fields: Any) -> TrainConfig:
    """A run of the llama with adapters, on its head too."""
    base = config(out, policy="llama", **{"optim": OPTIM} | fields)
    return replace(base, model=replace(base.model, lora=lora))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.arange(2, 20)[None]).logits
    return result


def test_a_run_resumes_to_the_bit_and_leaves_both_folders(
    config: Config, folders: dict[str, Path]
) -> None:
    whole, parts = of(config, "whole"), of(config, "parts")
    expected = run(whole)
    assert all(row["sampler_mismatch_mean"] < 1e-5 for row in expected)
    run(replace(parts, steps=1, save_every=1))
    rows = run(replace(parts, resume=True))
    assert without_times(rows) == without_times(expected)
    ours, theirs = (
        load_file(c.out / "adapter" / "adapter_model.safetensors") for c in (whole, parts)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(tensor.abs().max() > 0 for tensor in ours.values())  # B has moved from 0

    stored = read(whole.out / "checkpoints" / "step_000003")
    base_bytes = (folders["llama"] / "model.safetensors").stat().st_size
    adapter_bytes = sum(4 * tensor.numel() for tensor in ours.values())
    # A, B and two moments, without the base; each of its tensors takes 2 kB of the file at most
    assert sum(stored.files.values()) < 3 * adapter_bytes + 2**21
    assert adapter_bytes < base_bytes / 4

    merged = AutoModelForCausalLM.from_pretrained(whole.out / "model")
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    before = logits(base)
    beside = peft.PeftModel.from_pretrained(base, str(whole.out / "adapter"))
    assert (logits(merged) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(beside), logits(merged), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_ranks_train_the_adapters_of_one_process(config: Config) -> None:
    whole, parts = of(config, "whole"), of(config, "parts")
    assert_same_metrics(together(parts, 2), alone(whole))
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        ours, theirs = load_file(parts.out / name), load_file(whole.out / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"optim": replace(OPTIM, updates_per_rollout=2)},
        {"engine": EngineConfig(staleness=1)},
        {"engine": EngineConfig(kind="continuous")},
        {"method": replace(EXACT, sampler_correction="mask")},
        {"log": LogConfig(diagnostics_every=1)},
    ],
    ids=["updates", "stale", "continuous", "correction", "measured"],
)
def test_other_settings_sample_from_the_adapters(config: Config, fields: dict[str, Any]) -> None:
    """An engine with a copy of the model samples from the merged weights."""
    rows = run(of(config, "run", **fields))
    mismatches = [row["sampler_mismatch_mean"] for row in rows]
    assert all(mismatch < 1e-5 for mismatch in mismatches if mismatch is not None), mismatches
    assert any(mismatch is not None for mismatch in mismatches[1:])
