"""KdrlTrainer without a teacher trains as GRPOTrainer does, to float32's rounding."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer

from kdrl_kernels.integrations.trl import KdrlConfig, KdrlTrainer
from tests.integrations.trl_runs import (
    OLD_NAMES,
    arguments,
    assert_same_runs,
    logs,
    small_model,
    trainer_of,
)

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)
LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo")
QUICK = [
    ("grpo", "token", 1, False),
    ("dapo", "token", 4, True),
    ("dr_grpo", "token", 1, True),
    ("bnpo", "token", 4, False),
    ("cispo", "token", 1, True),
    ("grpo", "sequence", 4, True),
]
MATRIX = [
    (*case, place % 4 in (1, 2))  # half of them with a tool's tokens: all pairs of settings
    for place, case in enumerate(product(LOSSES, ("token", "sequence"), (1, 4)))
    if case not in {quick[:3] for quick in QUICK}
]


class ToolMasked:
    """Marks a third of the sampled tokens as a tool's, which get no loss."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        output["tool_mask"] = (output["completion_ids"] % 3 != 0).int()
        mask = output["completion_mask"] * output["tool_mask"]
        output["num_items_in_batch"] = mask.sum()
        return output


class ToolMaskedGrpo(ToolMasked, GRPOTrainer):
    pass


class ToolMaskedKdrl(ToolMasked, KdrlTrainer):
    pass


def _runs(folder: Path, *, masked: bool = False, **options: Any) -> tuple[Any, Any]:
    """Train TRL's trainer and ours with the same settings."""
    kinds = (ToolMaskedGrpo, ToolMaskedKdrl) if masked else (GRPOTrainer, KdrlTrainer)
    trainers = []
    for kind, config, more in zip(kinds, (GRPOConfig, KdrlConfig), ({}, {"kd": None}), strict=True):
        trainer = trainer_of(kind, arguments(config, folder, **options, **more))
        trainer.train()
        trainers.append(trainer)
    return trainers[0], trainers[1]


def assert_equal_runs(host: Any, ours: Any) -> None:
    assert_same_runs(ours, host, dict(small_model(1).named_parameters()))


@pytest.mark.parametrize(
    ("loss_type", "level", "accumulation", "masked"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX)],
)
def test_without_a_teacher_it_is_grpo(
    tmp_path: Path, loss_type: str, level: str, accumulation: int, masked: bool
) -> None:
    host, ours = _runs(
        tmp_path,
        masked=masked,
        loss_type=loss_type,
        importance_sampling_level=level,
        gradient_accumulation_steps=accumulation,
    )
    assert_equal_runs(host, ours)


@pytest.mark.parametrize("loss_type", ["dapo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_one_generation_serves_several_steps(tmp_path: Path, loss_type: str) -> None:
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4}
    host, ours = _runs(tmp_path, masked=True, loss_type=loss_type, **options)
    assert_equal_runs(host, ours)


def _most_clipped(trainer: Any) -> float:
    return max(line.get("clip_ratio/region_mean", 0.0) for line in logs(trainer))


@pytest.mark.parametrize(
    "loss_type", [LOSSES[0], *(pytest.param(x, marks=pytest.mark.slow) for x in LOSSES[1:])]
)
def test_ratios_and_clipping(tmp_path: Path, loss_type: str) -> None:
    options = {"num_iterations": 2, "learning_rate": 0.5, "max_steps": 4, "max_grad_norm": 10.0}
    host, ours = _runs(tmp_path, masked=True, loss_type=loss_type, **options)
    assert_equal_runs(host, ours)
    if loss_type != "cispo":
        assert _most_clipped(host) > 0.05
