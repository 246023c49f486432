"""Small models, prompts and runs of TRL's trainers, for the tests of kdrl_kernels.integrations.trl.

A vocabulary of 262 tokens, a quarter of which end a completion, so that lengths differ.
"""

import copy
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers.utils.logging import disable_progress_bar

from kdrl_train.tools.toy.models import ArchitectureConfig, make_model, train_tokenizer

PROMPTS = ("What is 3 plus 4?", "12 times 5", "Say 7", "How much is 81 minus 30 plus 2?")
SEED = 5
SIZES = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "softcap": ("gemma2", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "divided": ("granite", {"logits_scaling": 4.0}),
    "multiplied": ("cohere", {"logit_scale": 0.25}),
    "bias": ("phi", {"partial_rotary_factor": 0.5}),
    "tied": ("llama", {"tie_word_embeddings": True}),
}
"""Heads that differ: what is special, and a family of transformers that has it."""
disable_progress_bar()

OLD_NAMES = (
    "ignore:.*gradient_checkpointing.* is deprecated and will be removed in v6:FutureWarning"
)
"""A filter of warnings: TRL reads names that transformers 5 calls old."""


@cache
def tokenizer() -> Any:
    """Return a byte-level tokenizer that pads on the left."""
    return train_tokenizer(PROMPTS, 262)


@cache
def _model(seed: int, hidden: int, family: str, *, tied: bool) -> Any:
    shape = ArchitectureConfig(
        family=family,  # type: ignore[arg-type]
        hidden=hidden,
        layers=2,
        heads=2,
        kv_heads=2,
        intermediate=48,
        tied=tied,
    )
    model = make_model(shape, tokenizer(), seed)
    for parameter in model.parameters():  # wide weights: the models differ, entropies too
        if parameter.ndim == 2:
            parameter.data.mul_(5)
    model.generation_config.eos_token_id = list(range(2, 262, 4))
    return model


def small_model(seed: int, hidden: int = 32, family: str = "qwen2", *, tied: bool = False) -> Any:
    """Make a causal LM of two layers, the same one for the same arguments."""
    return copy.deepcopy(_model(seed, hidden, family, tied=tied))


def family(name: str, **config: Any) -> Any:
    """Make a small random model of a family of transformers, the same one each time."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        made = transformers.AutoConfig.for_model(name, **SIZES | config)
        model = transformers.AutoModelForCausalLM.from_config(made)
    model.generation_config.eos_token_id = list(range(2, 262, 4))
    return model


def prompts(rows: int = len(PROMPTS)) -> Dataset:
    """Return a data set of prompts of different lengths, four unlike ones."""
    return Dataset.from_dict({"prompt": [PROMPTS[row % len(PROMPTS)] for row in range(rows)]})


def reward(completions: list[str], **columns: Any) -> list[float]:  # noqa: ARG001
    """Judge completions by the sum of their bytes: no two are alike, and all is repeatable."""
    return [sum(text.encode()) % 17 / 16 for text in completions]


def arguments(kind: Any, folder: Path, **options: Any) -> Any:
    """Make the arguments of a run of three steps on a CPU, in float32, by plain SGD."""
    known = {one.name for one in fields(kind)}
    values = plain_settings(folder)
    return kind(**{name: values[name] for name in known & values.keys()} | options)


def plain_settings(folder: Path) -> dict[str, Any]:
    """Return those arguments by name."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "temperature": 0.9,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": SEED,
    }


def trainer_of(kind: Any, args: Any, model: Any | None = None, **options: Any) -> Any:
    """Make a trainer of a small model (seed 1) on the prompts."""
    values = {"train_dataset": prompts(), "processing_class": tokenizer(), "reward_funcs": reward}
    return kind(model=small_model(1) if model is None else model, args=args, **values | options)


def logs(trainer: Any) -> list[dict[str, float]]:
    """Return what a trainer logged at each step, without times."""
    return [
        {k: v for k, v in line.items() if "time" not in k and "runtime" not in k}
        for line in trainer.state.log_history
        if "loss" in line
    ]


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a trainer's model."""
    return {name: p.detach() for name, p in trainer.model.named_parameters()}


def trained(trainer: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained."""
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_runs(
    ours: Any,
    theirs: Any,
    before: dict[str, torch.Tensor],
    names: tuple[str, ...] = (),
    tolerance: float = 1e-5,
) -> None:
    """Compare what was logged, or some names of it, and the trained weights.

    before: the weights at the start, from which they must have moved, else equality says nothing.
    """
    for record, expected in zip(logs(ours), logs(theirs), strict=True):
        assert names or record.keys() == expected.keys()
        for name in names or expected:
            value = pytest.approx(expected[name], rel=tolerance, abs=tolerance / 10)
            assert record[name] == value, name
    weights = trained(ours)
    assert weights.keys() == trained(theirs).keys()
    moves = [(p - before[name]).abs().max().item() for name, p in trained(theirs).items()]
    assert max(moves) > 1e-3
    close = {"rtol": tolerance, "atol": tolerance * max(moves)}
    for name, weight in trained(theirs).items():
        torch.testing.assert_close(weights[name], weight, msg=name, **close)
