"""KdrlTrainer's loss and gradient with a teacher: full logits in float64, and kdrl_train's own."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("trl")


from kdrl_train.batch import Rollouts
from kdrl_train.method.config import MethodConfig
from kdrl_train.model.packing import pack
from kdrl_train.model.policy import Policy, Teacher
from tests.integrations.trl_micro_batches import (
    ACCUMULATION,
    BETA,
    CLIP,
    B,
    C,
    V,
    assert_same_gradient,
    gradient_of,
    kd_term,
    logits_of,
    micro_batch,
    policy_loss,
    reduced,
    trainer_in_a_step,
)
from tests.integrations.trl_runs import OLD_NAMES, small_model
from tests.train.coefficients import uniform

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)


def _by_hand(
    model: Any, teacher: Any, inputs: dict[str, Any], kd: str, loss_type: str, level: str
) -> Tensor:
    """Compute the loss from full logits of both models."""
    p, q = logits_of(model, inputs), logits_of(teacher, inputs)
    p, q = p.log_softmax(-1), q[..., :V].log_softmax(-1)
    lp = p.gather(-1, inputs["completion_ids"][..., None])[..., 0]
    mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).double()
    log_ratio = lp - inputs.get("old_per_token_logps", lp.detach())
    weight = log_ratio.detach().exp().clamp(max=2.0)
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None]
    policy = policy_loss(loss_type, log_ratio.exp(), lp, inputs["advantages"][:, None].double())
    sampler = inputs.get("importance_sampling_ratio", torch.ones(B, C))
    losses = sampler * (policy + BETA * weight * kd_term(kd, p, q, inputs["completion_ids"]))
    return reduced(loss_type, losses, mask)


KDS = ("k2", "k3", "rkl", "fkl", "jsd", "rkl+fkl")
OPTIONS = {"jsd": {"jsd_alpha": 0.4}, "rkl+fkl": {"fkl_share": 0.3}}
QUICK = [
    *(("grpo", "token", kd) for kd in KDS),
    ("dapo", "token", "k2"),
    ("bnpo", "token", "rkl"),
    ("dr_grpo", "token", "k2"),
    ("cispo", "token", "k2"),
    ("cispo", "token", "rkl"),
    ("grpo", "sequence", "k2"),
    ("dapo", "sequence", "jsd"),
]
LOSSES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo")
MATRIX = [case for case in product(LOSSES, ("token", "sequence"), KDS) if case not in QUICK]


@pytest.mark.parametrize(
    ("loss_type", "level", "kd"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX)],
)
def test_gradient_is_that_of_full_logits(
    tmp_path: Path, loss_type: str, level: str, kd: str
) -> None:
    teacher = small_model(2, hidden=48).double()
    teacher.resize_token_embeddings(V + 8)  # padding columns, which the student lacks
    more = OPTIONS.get(kd, {}) | ({"epsilon_high": 5.0} if loss_type == "cispo" else {})
    options = {"loss_type": loss_type, "importance_sampling_level": level, "kd": kd} | more
    trainer = trainer_in_a_step(tmp_path, teacher, **options)
    inputs = micro_batch(trainer.model)
    loss = trainer._compute_loss(trainer.model, inputs)
    exact = _by_hand(trainer.model, teacher, inputs, kd, loss_type, level)
    assert_close(loss.double(), exact, rtol=1e-6, atol=1e-7)
    assert_same_gradient(gradient_of(trainer.model, loss), gradient_of(trainer.model, exact))


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
@pytest.mark.parametrize("kd", ["k2", "rkl"])
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_sampler_ratio_weights_the_teacher_too(
    tmp_path: Path, loss_type: str, kd: str, per: str
) -> None:
    teacher = small_model(2).double()
    high = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    trainer = trainer_in_a_step(tmp_path, teacher, loss_type=loss_type, kd=kd, **high)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    inputs = micro_batch(trainer.model)
    ratio = torch.rand(B, C if per == "token" else 1, generator=torch.manual_seed(0)) + 0.5
    ratio[1] = 0.0  # TRL's mask of a completion whose ratio is too large
    inputs["importance_sampling_ratio"] = ratio
    loss = trainer._compute_loss(trainer.model, inputs)
    exact = _by_hand(trainer.model, teacher, inputs, kd, loss_type, "token")
    assert_same_gradient(gradient_of(trainer.model, loss), gradient_of(trainer.model, exact))


def _rollouts(inputs: dict[str, Any]) -> Rollouts:
    """Return TRL's micro-batch as kdrl_train has it, without padding."""
    prompts, completions = (
        [row[kept.bool()] for row, kept in zip(inputs[ids], inputs[mask], strict=True)]
        for ids, mask in (("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask"))
    )
    return Rollouts(
        prompt_ids=prompts,
        completion_ids=completions,
        logprobs=[torch.zeros(len(ids)) for ids in completions],
        truncated=torch.zeros(B, dtype=torch.bool),
        texts=[""] * B,
    )


@pytest.mark.parametrize("kd", ["k2", "rkl", "jsd"])
@pytest.mark.parametrize("reduction", ["dapo", "grpo"])
def test_the_loss_is_that_of_kdrl_train(tmp_path: Path, kd: str, reduction: str) -> None:
    teacher = small_model(2).double()
    trainer = trainer_in_a_step(tmp_path, teacher, kd=kd, loss_type=reduction)
    inputs = micro_batch(trainer.model, on_policy=True, tools=False)
    loss = trainer._compute_loss(trainer.model, inputs)
    ours = gradient_of(trainer.model, loss)

    method = MethodConfig(kd=kd, clip_low=CLIP["epsilon"], clip_high=CLIP["epsilon_high"])
    policy = Policy(small_model(1).double(), method, temperature=0.9, compute_dtype=torch.float64)
    q = Teacher(small_model(2).double(), temperature=0.9, compute_dtype=torch.float64)
    rollouts = _rollouts(inputs)
    weights, normalizer = torch.ones(B), torch.tensor(31.0)
    if reduction == "grpo":
        weights, normalizer = 1 / rollouts.lengths.double(), torch.tensor(float(B * ACCUMULATION))
    coefficients = uniform(
        B,
        advantages=inputs["advantages"],
        kd_weight=torch.full((B,), BETA),
        token_weights=weights,
    )
    theirs: dict[str, Tensor] = {}
    total = 0.0
    for batch in pack(rollouts, coefficients, 20):
        out = policy(batch, normalizer, q(batch))
        total += out.loss.item()
        for name, gradient in gradient_of(policy.model, out.loss).items():
            theirs[name] = theirs.get(name, 0.0) + gradient
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert_same_gradient(ours, theirs)
