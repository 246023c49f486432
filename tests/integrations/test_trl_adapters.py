"""KdrlTrainer with LoRA policies, also on the LM head, which TRL's own head cannot have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from kdrl_kernels.integrations.trl import KdrlConfig, KdrlTrainer
from tests.integrations.full_logits import BETA, FullLogitsTrainer
from tests.integrations.trl_runs import OLD_NAMES, arguments, logs, small_model, trained, trainer_of

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def train(kind: Any, args: Any, lora: dict[str, Any], **options: Any) -> tuple[Any, dict[str, Any]]:
    """Train a LoRA of a small model, the same one each time; return the adapter as it was too."""
    torch.manual_seed(0)  # peft draws the first weights before TRL sets its seed
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, **lora)
    trainer = trainer_of(kind, args, peft_config=adapter, **options)
    before = {name: p.detach().clone() for name, p in trained(trainer).items()}
    trainer.train()
    return trainer, before


def assert_same_training(ours: Any, theirs: Any, before: dict[str, Tensor]) -> None:
    """Compare loss, norm and adapters, to float32's rounding."""
    for record, expected in zip(logs(ours), logs(theirs), strict=True):
        for name in ("loss", "grad_norm", "entropy"):
            assert record[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    assert trained(ours).keys() == trained(theirs).keys() == before.keys()
    for name, weight in trained(theirs).items():
        moved = (weight - before[name]).abs().max().item()
        assert moved > 1e-3, name  # else equality says nothing
        torch.testing.assert_close(
            trained(ours)[name], weight, rtol=1e-5, atol=1e-5 * moved, msg=name
        )


@pytest.mark.parametrize("teacher", [False, True], ids=["no teacher", "teacher"])
@pytest.mark.parametrize("lora", TARGETS.values(), ids=TARGETS)
def test_lora_trains_as_with_full_logits(
    tmp_path: Path, lora: dict[str, Any], teacher: bool
) -> None:
    # KD is multiplied by the ratio to the sampling policy, which FullLogitsTrainer leaves out
    options = {"learning_rate": 2.0, "num_iterations": 1 if teacher else 2, "max_steps": 4}
    pull = {"kd": "rkl", "kd_coef": BETA} if teacher else {"kd": None}
    models = [small_model(2, hidden=48) if teacher else None for _ in range(2)]
    args = arguments(GRPOConfig, tmp_path, **options)
    theirs, before = train(FullLogitsTrainer, args, lora, teacher=models[0])
    args = arguments(KdrlConfig, tmp_path, **options, **pull)
    ours, _ = train(KdrlTrainer, args, lora, teacher_model=models[1])
    assert_same_training(ours, theirs, before)


@pytest.mark.parametrize("name", ["attention", "head saved"])
def test_lora_trains_as_with_trl(tmp_path: Path, name: str) -> None:
    lora, options = TARGETS[name], {"learning_rate": 5.0}
    theirs, before = train(GRPOTrainer, arguments(GRPOConfig, tmp_path, **options), lora)
    ours, _ = train(KdrlTrainer, arguments(KdrlConfig, tmp_path, kd=None, **options), lora)
    assert_same_training(ours, theirs, before)


@pytest.mark.parametrize(
    ("lora", "options", "message"),
    [
        ({"use_dora": True}, {}, "got one with DoRA or another variant"),
        ({"lora_dropout": 0.1}, {}, "got one with dropout"),
        ({}, {"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32 must be False with an adapter"),
    ],
)
def test_what_a_head_cannot_have_is_refused_at_construction(
    tmp_path: Path, lora: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"], **lora)
    args = arguments(KdrlConfig, tmp_path, kd=None, **options)
    with pytest.raises(ValueError, match=message) as error:
        trainer_of(KdrlTrainer, args, peft_config=adapter)
    assert "\n" not in str(error.value)


def test_trls_trainer_still_refuses_a_head(tmp_path: Path) -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"])
    trainer_of(KdrlTrainer, arguments(KdrlConfig, tmp_path, kd=None), peft_config=adapter)
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer_of(GRPOTrainer, arguments(GRPOConfig, tmp_path), peft_config=adapter)
