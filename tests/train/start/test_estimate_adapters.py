"""The estimate of memory with adapters, and of optimisers by name: terms by hand."""

from dataclasses import replace
from typing import Any

import pytest

from kdrl_train.config import LoraConfig, ModelConfig, OptimConfig
from kdrl_train.model.lora import count, head_rank, inject, parameters
from kdrl_train.start.estimate.shapes import read_model
from tests.train.estimate_cases import case_of
from tests.train.start.test_estimate import values


def test_adapters_by_hand(models: dict[str, str]) -> None:
    """Two layers with A [2, 8] and B [8, 2] of q_proj, A [2, 8] and B [16, 2] of up_proj: 160."""
    model = ModelConfig(lora=LoraConfig(rank=2, targets=("q_proj", "up_proj")))
    run = case_of(models, "untied").run
    base = read_model(models["untied"], "model.policy")
    adapters = count(base, model.lora)
    inject(base, model.lora, 0)
    assert adapters == parameters(base)[0] == 2 * 2 * (8 + 8 + 8 + 16)
    head = LoraConfig(rank=2, targets=("lm_head",))
    plain = read_model(models["untied"], "model.policy")
    assert (head_rank(plain, model.lora), head_rank(plain, head)) == (0, 2)
    case = case_of(models, "untied", run=replace(run, model=model), adapters=adapters)
    whole, ours = values(case_of(models, "untied")), values(case)
    assert ours["frozen weights"] == 4 * 1736
    assert ours["weights, float32"] == ours["gradients, float32"] == 4 * 160
    assert ours["AdamW moments"] == 8 * 160
    assert ours["AdamW temporaries"] == 8 * 160
    assert whole.keys() - ours.keys() == {"the embedding's gradient", "dW accumulator, float32"}
    assert case.weight_bytes == 4
    half = replace(case, run=replace(case.run, model=replace(model, dtype="bfloat16")))
    assert values(half)["frozen weights"] == 2 * 1736
    assert "copy of the policy that samples" not in values(half)  # which has its dtype already
    assert half.stream_bytes == 2
    # forward and dX: 2 of the head's 3 products
    assert sum(case.chunk_plan(64).flop.values()) == 2 * (2 * 64 * 8 * 32)


def test_the_base_as_reference_takes_no_memory(models: dict[str, str]) -> None:
    case = case_of(models, "untied")
    case = replace(case, teacher=case.policy, other_teachers=(case.policy,))
    for lora, held in ((LoraConfig(), 1736), (LoraConfig(rank=2), 0)):
        model = ModelConfig(teacher="t", reference="self", lora=lora)
        ours = replace(case, run=replace(case.run, model=model))
        assert ours.kept_parameters == held
        assert not ours.teaches_itself


@pytest.mark.parametrize(
    ("optim", "term", "each"),
    [
        ({"name": "adamw"}, "AdamW moments", 8),
        ({"name": "adamw_8bit"}, "AdamW moments", 2 * (1 + 4 / 256)),
        ({"name": "paged_adamw"}, "AdamW moments", 8),
        ({"name": "sgd", "momentum": 0.9}, "momentum", 4),
        ({"name": "sgd"}, "momentum", None),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_moments_of_each_optimiser(
    models: dict[str, str], optim: dict[str, Any], term: str, each: float | None
) -> None:
    run = case_of(models, "untied").run
    held = values(case_of(models, "untied", run=replace(run, optim=OptimConfig(**optim))))
    assert held.get(term) == (None if each is None else each * 1736)
    assert {"AdamW moments", "momentum"} & held.keys() <= {term}
