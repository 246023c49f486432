"""A student whose LM head has columns that the teacher's lacks, as padding of other sizes gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("trl")

from kdrl_kernels.integrations.trl import KdrlConfig, KdrlTrainer
from tests.integrations.trl_micro_batches import (
    ACCUMULATION,
    BETA,
    CLIP,
    V,
    assert_same_gradient,
    gradient_of,
    kd_term,
    logits_of,
    micro_batch,
    policy_loss,
    reduced,
)
from tests.integrations.trl_runs import OLD_NAMES, arguments, small_model, trainer_of

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)


def wide_model() -> Any:
    """Return a model with eight columns more, which hold a third of its probability."""
    model = small_model(1).double()
    model.resize_token_embeddings(V + 8)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        model.lm_head.weight[V:] = torch.randn(8, 32, generator=draw, dtype=torch.float64) / 2
    return model


@pytest.mark.parametrize(
    ("loss_type", "kd"), [("dapo", "k2"), ("grpo", "rkl"), ("cispo", "k2"), ("cispo", "fkl")]
)
def test_the_policy_gradient_is_over_all_columns(tmp_path: Path, loss_type: str, kd: str) -> None:
    clip = CLIP | ({"epsilon_high": 5.0} if loss_type == "cispo" else {})
    options = {"loss_type": loss_type, "gradient_accumulation_steps": ACCUMULATION, **clip}
    args = arguments(KdrlConfig, tmp_path, kd=kd, kd_coef=BETA, **options)
    teacher = small_model(2).double()
    trainer = trainer_of(KdrlTrainer, args, wide_model(), teacher_model=teacher)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = ACCUMULATION
    inputs = micro_batch(trainer.model)
    loss = trainer._compute_loss(trainer.model, inputs)

    tokens = inputs["completion_ids"]
    logits, q = logits_of(trainer.model, inputs), logits_of(teacher, inputs).log_softmax(-1)
    p = logits.log_softmax(-1)
    assert p[..., V:].exp().sum(-1).max() > 0.2
    lp = p.gather(-1, tokens[..., None])[..., 0]
    log_ratio = lp - inputs["old_per_token_logps"]
    weight = log_ratio.detach().exp().clamp(max=2.0)
    policy = policy_loss(loss_type, log_ratio.exp(), lp, inputs["advantages"][:, None].double())
    # an exact KL is over the columns of both models: the teacher has no probability of the others
    p = p[..., :V] if kd == "k2" else logits[..., :V].log_softmax(-1)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).double()
    exact = reduced(loss_type, policy + BETA * weight * kd_term(kd, p, q, tokens), mask)
    assert_close(loss.double(), exact, rtol=1e-6, atol=1e-7)
    assert_same_gradient(gradient_of(trainer.model, loss), gradient_of(trainer.model, exact))
