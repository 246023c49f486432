"""Every loss, option and kind of head of GRPOTrainer trains the same in KdrlTrainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from peft import PromptTuningConfig
from trl import GRPOConfig, GRPOTrainer

from kdrl_kernels.integrations.trl import KdrlConfig, KdrlTrainer
from tests.integrations.trl_runs import (
    EXPERTS,
    FAMILIES,
    OLD_NAMES,
    arguments,
    assert_same_runs,
    family,
    logs,
    small_model,
    tokenizer,
    trained,
    trainer_of,
)

pytestmark = pytest.mark.filterwarnings(
    OLD_NAMES,
    # generate passes position ids; peft leaves them out for virtual tokens
    "ignore:Position ids are not supported for parameter efficient tuning:UserWarning",
)


def train(kind: Any, args: Any, model: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Train a model; return the trainer, and the weights as they were."""
    torch.manual_seed(0)
    trainer = trainer_of(kind, args, model, **options)
    before = {name: p.detach().clone() for name, p in trained(trainer).items()}
    trainer.train()
    return trainer, before


def assert_same_training(
    folder: Path, make: Any, tolerance: float = 1e-5, *, more: Any = dict, **options: Any
) -> Any:
    """Train as GRPOTrainer and as KdrlTrainer without a teacher; compare logs and weights.

    make: makes the model; more: makes further arguments of the trainer. Both are called twice.
    """
    options = {"learning_rate": 0.5, "num_iterations": 2, "max_steps": 4} | options
    host, before = train(GRPOTrainer, arguments(GRPOConfig, folder, **options), make(), **more())
    args = arguments(KdrlConfig, folder, kd=None, **options)
    ours, _ = train(KdrlTrainer, args, make(), **more())
    assert_same_runs(ours, host, before, tolerance=tolerance)
    return ours


LOSSES: dict[str, dict[str, Any]] = {
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "entropy bonus": {"entropy_coef": 0.1},
    "adaptive entropy": {"use_adaptive_entropy": True},
    "high-entropy tokens": {"top_entropy_quantile": 0.5},
    "off-policy mask": {"off_policy_mask_threshold": 0.01},
    "two-sided clipping": {"delta": 1.5},
    "truncated masked": {"mask_truncated_completions": True},
    "checkpointing": {"gradient_checkpointing": True, "loss_type": "grpo"},
    "batch scale": {"scale_rewards": "batch", "loss_type": "dr_grpo"},
}
SLOW = ("adaptive entropy", "batch scale", "vespo", "sapo", "truncated masked")
SLOW += ("divided", "multiplied", "tied")


def _cases(table: dict[str, Any]) -> list[Any]:
    """Return the values of a table as parameters, some of them marked slow."""
    return [
        pytest.param(value, id=name, marks=pytest.mark.slow if name in SLOW else [])
        for name, value in table.items()
    ]


@pytest.mark.parametrize("options", _cases(LOSSES))
def test_every_loss(tmp_path: Path, options: dict[str, Any]) -> None:
    assert_same_training(tmp_path, lambda: small_model(1), **options)


@pytest.mark.parametrize("corrected", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_reference_model(tmp_path: Path, corrected: bool) -> None:
    folder = str(tmp_path / "model")
    small_model(1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    options = {"beta": 0.1, "use_bias_correction_kl": corrected, "loss_type": "grpo"}
    ours = assert_same_training(tmp_path, lambda: folder, **options)
    assert "kl" in logs(ours)[-1]


def test_a_reference_model_is_computed_as_the_policy(tmp_path: Path) -> None:
    """Under autocast TRL's own head would round the logits of the reference alone."""
    folder = str(tmp_path / "model")
    small_model(1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    args = arguments(KdrlConfig, tmp_path, kd=None, beta=0.1, bf16=True, max_steps=1)
    trainer, _ = train(KdrlTrainer, args, folder)
    assert logs(trainer)[0]["kl"] == 0.0  # the policy is the reference


@pytest.mark.parametrize("made", _cases(FAMILIES))
def test_every_head(tmp_path: Path, made: tuple[str, dict[str, Any]]) -> None:
    assert_same_training(tmp_path, lambda: family(made[0], **made[1]))


@pytest.mark.parametrize(
    ("loss_type", "coefficient"),
    [("dapo", 0.1), ("cispo", None), pytest.param("dapo", None, marks=pytest.mark.slow)],
)
def test_experts_balance(tmp_path: Path, loss_type: str, coefficient: float | None) -> None:
    options = {"loss_type": loss_type, "router_aux_loss_coef": coefficient}
    options |= {"gradient_accumulation_steps": 2, "num_iterations": 1}
    make = lambda: family("mixtral", **EXPERTS, router_aux_loss_coef=0.5)  # noqa: E731
    ours = assert_same_training(tmp_path, make, **options)
    assert ours.router_aux_loss_coef == (0.5 if coefficient is None else coefficient)
    assert logs(ours)[-1]["aux_loss"] > 0


def test_a_head_in_float32(tmp_path: Path) -> None:
    make = lambda: small_model(1).to(torch.bfloat16)  # noqa: E731
    assert_same_training(tmp_path, make, 2e-2, cast_lm_head_to_fp32=True, learning_rate=0.1)


def test_autocast(tmp_path: Path) -> None:
    options = {"bf16": True, "learning_rate": 0.1, "num_iterations": 1, "max_steps": 2}
    assert_same_training(tmp_path, lambda: small_model(1), 3e-2, **options)


def test_prompt_tuning(tmp_path: Path) -> None:
    def more() -> dict[str, Any]:
        return {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}

    assert_same_training(tmp_path, lambda: small_model(1), more=more)


def _some_tokens() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(6, 262, (3, 9), generator=draw), torch.ones(3, 9, dtype=torch.int64)


def test_the_arithmetic_of_a_head_in_float32_is_trls(tmp_path: Path) -> None:
    def scores(kind: Any, config: Any, **options: Any) -> tuple[Tensor, Tensor]:
        args = arguments(config, tmp_path, cast_lm_head_to_fp32=True, **options)
        trainer = trainer_of(kind, args, small_model(1).to(torch.bfloat16))
        trainer.model.lm_head.weight.data.mul_(1.001)  # no longer numbers of bfloat16
        run = trainer._get_per_token_logps_and_entropies
        return run(trainer.model, *_some_tokens(), 5, compute_entropy=True)[:2]

    ours, host = scores(KdrlTrainer, KdrlConfig, kd=None), scores(GRPOTrainer, GRPOConfig)
    torch.testing.assert_close(ours, host, rtol=1e-5, atol=1e-6)


def test_the_arithmetic_under_autocast_is_in_16_bits(tmp_path: Path) -> None:
    trainer = trainer_of(KdrlTrainer, arguments(KdrlConfig, tmp_path, kd=None), small_model(1))
    model, (ids, mask) = trainer.model, _some_tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).log_probs
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    rounded, weight = hidden.bfloat16().double(), model.lm_head.weight.bfloat16().double()
    exact = (rounded @ weight.T / 0.9).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
