"""A micro-batch as TRL makes it, its loss by definition, and a float64 trainer inside a step."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from kdrl_kernels.integrations.trl import KdrlConfig, KdrlTrainer
from tests.integrations.trl_runs import arguments, small_model, trainer_of

B, P, C, V = 4, 5, 6, 262
ACCUMULATION = 2
BETA = 0.3
LENGTHS = ((5, 6), (2, 3), (4, 1), (3, 5))
"""Tokens of each prompt, padded on the left, and completion, padded on the right."""
CLIP = {"epsilon": 0.1, "epsilon_high": 0.15}


def micro_batch(model: Any, *, on_policy: bool = False, tools: bool = True) -> dict[str, Any]:
    """Return a micro-batch as TRL makes it, whose ratios are clipped in places."""
    draw = torch.Generator().manual_seed(3)
    prompts, completions = torch.arange(P), torch.arange(C)
    inputs: dict[str, Any] = {
        "prompt_ids": torch.randint(6, V, (B, P), generator=draw),
        "prompt_mask": torch.stack([prompts >= P - p for p, _ in LENGTHS]).int(),
        "completion_ids": torch.randint(6, V, (B, C), generator=draw),
        "completion_mask": torch.stack([completions < c for _, c in LENGTHS]).int(),
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.1]),
        "num_items_in_batch": torch.tensor(31),
    }
    if tools:
        inputs["tool_mask"] = (inputs["completion_ids"] % 4 != 0).int()
    if not on_policy:
        with torch.no_grad():
            old = logprobs_of(model, inputs).float()
        noise = torch.randn(B, C, generator=draw) * 0.3
        noise[0, 1] = -3.0  # a ratio of 20: beyond the cap of the KD term's weight
        inputs["old_per_token_logps"] = old + noise
    return inputs


def logits_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the logits [B, C, V] that predict the completions, at the temperature 0.9."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return model(input_ids=ids, attention_mask=mask).logits[:, -C - 1 : -1] / 0.9


def logprobs_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    logprobs = logits_of(model, inputs).log_softmax(-1)
    return logprobs.gather(-1, inputs["completion_ids"][..., None])[..., 0]


def policy_loss(loss_type: str, ratio: Tensor, lp: Tensor, advantages: Tensor) -> Tensor:
    """Return TRL's loss of each token, from its definition."""
    if loss_type == "cispo":
        return -ratio.clamp(max=5.0).detach() * advantages * lp
    clipped = ratio.clamp(1 - CLIP["epsilon"], 1 + CLIP["epsilon_high"])
    return -torch.minimum(ratio * advantages, clipped * advantages)


def reduced(loss_type: str, losses: Tensor, mask: Tensor) -> Tensor:
    """Reduce token losses [B, C] as TRL's loss types do, with ACCUMULATION micro-batches."""
    total = (losses * mask).sum()
    if loss_type == "grpo":
        each = (losses * mask).sum(1) / mask.sum(1).clamp(min=1)
        return each.mean() / ACCUMULATION
    if loss_type == "bnpo":
        return total / mask.sum() / ACCUMULATION
    if loss_type == "dr_grpo":
        return total / (B * 8) / ACCUMULATION
    return total / 31  # of the step, which is one generation


def kd_term(
    name: str,
    p: Tensor,
    q: Tensor,
    tokens: Tensor,
    *,
    jsd_alpha: float = 0.4,
    fkl_share: float = 0.3,
    topk: int = 0,
) -> Tensor:
    """Return a KD term of each token by its definition, from log-probabilities over all columns."""

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first.exp() * (first - second)).sum(-1)

    log_ratio = (p - q).gather(-1, tokens[..., None])[..., 0]
    m = torch.logaddexp(p + math.log(1 - jsd_alpha), q + math.log(jsd_alpha))
    if name.startswith("topk"):
        best = q.topk(topk).indices
        others = (x.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True) for x in (p, q))
        p, q = (torch.cat([x.gather(-1, best), r], -1) for x, r in zip((p, q), others, strict=True))
    return {
        "k2": lambda: log_ratio.square() / 2,
        "k2, baseline": lambda: (log_ratio - kl(p, q).detach()).square() / 2,
        "k3": lambda: (-log_ratio).exp() - 1 + log_ratio,
        "rkl": lambda: kl(p, q),
        "fkl": lambda: kl(q, p),
        "jsd": lambda: jsd_alpha * kl(q, m) + (1 - jsd_alpha) * kl(p, m),
        "rkl+fkl": lambda: (1 - fkl_share) * kl(p, q) + fkl_share * kl(q, p),
        "topk_rkl": lambda: kl(p, q),
    }[name]()


def trainer_in_a_step(folder: Path, teacher: Any, **options: Any) -> Any:
    """Make a trainer in float64, in the middle of a step of two micro-batches."""
    values = {"gradient_accumulation_steps": ACCUMULATION, "kd_coef": BETA, **CLIP}
    if options.get("kd") is None:
        del values["kd_coef"]
    args = arguments(KdrlConfig, folder, **values | options)
    model = small_model(1).double()
    trainer = trainer_of(KdrlTrainer, args, model, teacher_model=teacher)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = ACCUMULATION
    return trainer


def gradient_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_gradient(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, gradient in exact.items():
        size = gradient.abs().max().item()
        assert size > 0, name
        assert_close(ours[name], gradient, rtol=1e-6, atol=1e-6 * size, msg=name)


def loss_and_gradient(trainer: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    values = micro_batch(trainer.model, **inputs)
    loss = trainer._compute_loss(trainer.model, values)
    return loss.detach(), gradient_of(trainer.model, loss)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)
