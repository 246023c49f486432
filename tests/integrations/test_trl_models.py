"""KdrlTrainer and models that name no backbone, or whose code and configuration differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

pytest.importorskip("trl")

from trl import GRPOConfig

from kdrl_kernels.integrations.trl import (
    KdrlConfig,
    KdrlDistillationConfig,
    KdrlDistillationTrainer,
    KdrlTrainer,
    config,
)
from tests.integrations.full_logits import BETA, FullLogitsTrainer
from tests.integrations.test_own_logits import gemma3
from tests.integrations.trl_runs import (
    OLD_NAMES,
    SIZES,
    arguments,
    assert_same_runs,
    family,
    logs,
    prompts,
    small_model,
    tokenizer,
    trained,
    trainer_of,
)

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)
NAMES = "loss", "grad_norm", "entropy"


def llama4() -> Any:
    return family("llama4_text", num_local_experts=2, intermediate_size_mlp=48)


def mllama() -> Any:
    torch.manual_seed(4)
    config = MllamaTextConfig(**SIZES | {"cross_attention_layers": [2]})
    model = MllamaForCausalLM(config)
    model.generation_config.eos_token_id = list(range(2, 262, 4))
    return model


@pytest.mark.parametrize("make", [llama4, pytest.param(mllama, marks=pytest.mark.slow)])
def test_a_model_that_is_its_own_base_trains(tmp_path: Path, make: Any) -> None:
    policies = make(), make()
    assert policies[0].base_model is policies[0]
    options = {"router_aux_loss_coef": 0.0} if make is llama4 else {}
    args = arguments(KdrlConfig, tmp_path, kd="rkl", kd_coef=BETA, **options)
    ours = trainer_of(KdrlTrainer, args, policies[0], teacher_model=small_model(2))
    ours.train()  # before the other one, whose constructor sets the seed
    args = arguments(GRPOConfig, tmp_path, **options)
    theirs = trainer_of(FullLogitsTrainer, args, policies[1], teacher=small_model(2))
    before = {name: weight.detach().clone() for name, weight in trained(theirs).items()}
    theirs.train()
    assert_same_runs(ours, theirs, before, NAMES)


def test_llama4_balances_its_experts(tmp_path: Path) -> None:
    """Its configuration has num_local_experts alone, which TRL's own head does not read."""
    losses = []
    for coefficient in (0.5, 0.0):
        options = {"max_steps": 1, "router_aux_loss_coef": coefficient}
        trainer = trainer_of(
            KdrlTrainer, arguments(KdrlConfig, tmp_path, kd=None, **options), llama4()
        )
        trainer.train()
        losses.append(logs(trainer)[0])
    balance = losses[0]["aux_loss"]
    assert 0.9 < balance < 2.0  # of two experts: 1 where both are used alike, 2 where one is
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"] + 0.5 * balance, rel=1e-5)


def test_a_cap_that_the_code_does_not_read_is_refused(tmp_path: Path) -> None:
    args = arguments(KdrlConfig, tmp_path, kd=None)
    model = gemma3(final_logit_softcapping=2.0, vocab_size=262)
    with pytest.raises(ValueError, match=r"^model must compute logits as .* the soft cap 2 out"):
        trainer_of(KdrlTrainer, args, model)
    args = arguments(KdrlConfig, tmp_path, kd="k2")
    with pytest.raises(ValueError, match=r"^teacher_model must compute logits as .* soft cap 2 "):
        trainer_of(KdrlTrainer, args, small_model(1), teacher_model=model)


def test_what_distillation_would_leave_out_is_refused(tmp_path: Path) -> None:
    args = arguments(KdrlDistillationConfig, tmp_path)
    cap = {"final_logit_softcapping": 2.0, "vocab_size": 262}
    virtual = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    student, other = small_model(1), small_model(2)
    cases = [
        (student, gemma3(**cap), r"^teacher_model must compute logits as .* soft cap 2 "),
        (gemma3(**cap), other, r"^model must compute logits as .* soft cap 2 "),
        (student, llama4(), r"^teacher_model must have a base_model below .* Llama4ForCausalLM"),
        (student, get_peft_model(other, virtual), r"^teacher_model must have no virtual tokens"),
        (student, student, r"^teacher_model must not share weights with model"),
    ]
    for model, teacher, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            KdrlDistillationTrainer(
                model, teacher, args, train_dataset=prompts(), processing_class=tokenizer()
            )
        assert "\n" not in str(error.value)


def test_both_trainers_look_at_the_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[Any] = []
    monkeypatch.setattr(config.logger, "warning", lambda *values: warnings.append(values[2]))
    options = {"kd": "k2", "top_p": 0.9}
    args = arguments(KdrlConfig, tmp_path, **options)
    trainer_of(KdrlTrainer, args, teacher_model=small_model(2))
    KdrlDistillationTrainer(
        small_model(1),
        small_model(2),
        arguments(KdrlDistillationConfig, tmp_path, **options),
        train_dataset=prompts(),
        processing_class=tokenizer(),
    )
    assert warnings == ["top_p=0.9"] * 2
