"""A run of 2 x 2 ranks, tensor parallelism and FSDP2, learns what one process learns."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdrl_train.config import LogConfig, OptimConfig, TrainConfig
from kdrl_train.start import preflight
from tests.train.ranks import on_processes
from tests.train.test_two_ranks import (
    ONE_SEQUENCE_PER_PACK,
    alone,
    assert_same_metrics,
    gradient,
    together,
)

Config = Callable[..., TrainConfig]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture
def split_config(
    config: Config, tiny: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> Config:
    """config of a family whose heads two ranks can share: split_config("qwen3", out="run")."""

    def make(family: str, tied: bool, out: str = "run", **fields: Any) -> TrainConfig:
        models = {
            # 261 rows, of the teacher's 262: another number on each rank
            "policy": (family, {"seed": 5, "tie_word_embeddings": tied, "vocab_size": 261} | HEADS),
            "teacher": ("qwen3", {"seed": 6, "hidden": 48, "vocab_size": 262} | HEADS),
        }
        for name, (kind, settings) in models.items():
            if not (tmp_path / name).exists():
                tiny(kind, **settings).save_pretrained(tmp_path / name)
                tokenizer.save_pretrained(tmp_path / name)
        base = config(out, **fields)
        folders = {name: str(tmp_path / name) for name in models}
        return replace(base, model=replace(base.model, **folders))

    return make


def split(settings: TrainConfig, tensor: int = 2) -> TrainConfig:
    return replace(settings, model=replace(settings.model, tensor_parallel=tensor))


@pytest.mark.parametrize(
    ("family", "tied"), [("qwen3", True), pytest.param("llama", False, marks=pytest.mark.slow)]
)
def test_split_ranks_learn_what_one_process_learns(
    split_config: Config, family: str, tied: bool
) -> None:
    optim = OptimConfig(learning_rate=1e-3, micro_batch_tokens=64, max_grad_norm=0.5)
    settings = {"steps": 3, "save_every": 1, "keep_checkpoints": 3, "optim": optim}
    whole, parts = (split_config(family, tied, out, **settings) for out in ("whole", "parts"))
    assert_same_metrics(together(split(parts), 4), alone(whole))
    theirs = gradient(whole)
    for name, ours in gradient(parts).items():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-4, atol=1e-7, msg=name)
    after = dict(AutoModelForCausalLM.from_pretrained(whole.out / "model").named_parameters())
    saved = AutoModelForCausalLM.from_pretrained(parts.out / "model")
    for name, weight in saved.named_parameters():
        assert (weight - after[name]).abs().mean() < 1e-6, name  # of steps of 1e-3


def run_check(settings: TrainConfig, _rank: int) -> int:
    return preflight.main(settings)


@pytest.mark.slow
def test_check_reads_with_split_models(split_config: Config) -> None:
    settings = split(split_config("qwen3", True))
    assert on_processes(4, partial(run_check, settings)) == [0] * 4


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "bfloat16": ({"dtype": "bfloat16"}, {"kl_teacher": 0.1, "grad_norm": 0.1}),
    # where a sum differs by rounding, a sketch may keep another entry
    "sketch": (
        {"head_backward": "sketch", "head_threshold": 0.01, "head_flat": 1e9},
        {"kl_teacher": 1e-5, "sketch_entries": 1e-3, "grad_norm": 1e-2, "rl_grad_norm": 1e-5},
    ),
}
"""Settings of the model, and how near the numbers of a step must be where not all are the same."""


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_settings_of_the_model_hold_on_split_ranks(split_config: Config, name: str) -> None:
    model, near = VARIANTS[name]
    log = LogConfig(diagnostics_every=1)  # of the first micro-batches: here the whole step
    options = {
        "steps": 1,
        "log": log,
        "optim": replace(ONE_SEQUENCE_PER_PACK, micro_batch_tokens=9999),
    }
    both = (split_config("qwen3", True, out, **options) for out in ("whole", "parts"))
    whole, parts = (replace(x, model=replace(x.model, **model)) for x in both)
    # the same engines sample: one process would share its float32 weights with them
    records, expected = together(split(parts), 4), together(whole, 2)
    if not near:
        assert_same_metrics(records, expected)
    for key, rel in near.items():
        assert records[0][key] == pytest.approx(expected[0][key], rel=rel), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [((4, 2), (1, 1)), ((2, 1), (4, 2))],
    ids=str,
)
def test_a_split_run_resumes_on_other_ranks(
    split_config: Config, first: tuple[int, int], then: tuple[int, int]
) -> None:
    whole, parts = (split_config("qwen3", True, out, steps=4) for out in ("whole", "parts"))
    expected = alone(whole)
    ranks, tensor = first
    together(split(replace(parts, steps=2), tensor), ranks)
    ranks, tensor = then
    records = together(split(replace(parts, resume=True), tensor), ranks)
    assert_same_metrics(records, expected)
