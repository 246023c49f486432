"""The update: a step's batch through the loss, micro-batch by micro-batch, to the new weights."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from kdrl_train import grpo
from kdrl_train.diagnostics import gradient_split
from kdrl_train.engines import require_agreement
from kdrl_train.log import Stages
from kdrl_train.packing import pack
from kdrl_train.run import Batch, Run
from kdrl_train.sharding import full


def accumulate(
    run: Run, batch: Batch, step: int, stages: Stages
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gradient of the step's loss, micro-batch by micro-batch -> token sums of all ranks, and
    metrics: the loss and, at the steps of log.diagnostics_every, what is measured on the first one.

    Each micro-batch is divided by the normaliser of the whole step, so how it is cut does not
    matter; times the number of ranks, since FSDP2 averages gradients over them. One without
    distilled tokens costs no forward pass of the teacher. Raises: Stopped where a signal came.
    """
    config, policy, world = run.config, run.policy, run.world
    device = policy.device
    advantages_R, kd_weight_R = grpo.completion_terms(batch.rewards, config.method, step)
    weights_R, normalizer = grpo.token_weights(
        batch.rollouts.lengths,
        batch.rewards.flatten(),
        config.method.token_weights,
        config.sampling.max_new_tokens,
    )
    normalizer = normalizer.to(device) / world.size
    sums: dict[str, Tensor] = {}
    measured: dict[str, Any] = {}
    every = config.log.diagnostics_every
    loss = torch.zeros((), dtype=torch.float64, device=device)
    policy.train()
    rows = pack(
        batch.rollouts,
        advantages_R=advantages_R,
        weights_R=weights_R,
        kd_weight_R=kd_weight_R,
        micro_batch_tokens=config.optim.micro_batch_tokens,
        rank=world.rank,
        ranks=world.size,
    )
    for turn, row in enumerate(rows):
        run.stop_if_asked()
        packed = row.to(device)
        with stages("teacher"):
            teacher = run.teacher(packed) if run.teacher and packed.needs_teacher else None
        if every and step % every == 0 and turn == 0:
            with stages("diagnostics"):
                measured = gradient_split(policy, packed, normalizer, teacher)
        with stages("update"):
            out = policy(packed, normalizer, teacher)
            out.loss.backward()
            loss += out.loss.detach()
            sums = grpo.add_sums(sums, out.sums)
    mean = world.sum({"loss": loss})["loss"].item() / world.size
    return world.sum(sums, largest=("gap_max",)), {"loss": mean, **measured}


def take_step(run: Run, batch: Batch, step: int, row: dict[str, Any]) -> dict[str, float]:
    """Clip the gradient and take the optimiser step, unless a number says that it is wrong."""
    optim = run.config.optim
    norm = full(torch.nn.utils.clip_grad_norm_(run.policy.parameters(), optim.max_grad_norm)).item()
    stop_if_not_finite(run, batch, step, row["loss"], norm)
    limit = run.config.engine.limit(run.config.model.dtype)
    require_agreement(row["sampler_gap_mean"], limit, step)
    rate = grpo.learning_rate(optim.learning_rate, optim.warmup_steps, step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm, "learning_rate": rate}


def stop_if_not_finite(run: Run, batch: Batch, step: int, loss: float, grad_norm: float) -> None:
    """Raise FloatingPointError, with the step's batch dumped, unless both numbers are finite."""
    if torch.isfinite(torch.tensor([loss, grad_norm])).all():
        return
    path = run.config.out / f"failed_step_{step:06d}.pt"
    dump = {
        "step": step,
        "loss": loss,
        "grad_norm": grad_norm,
        "rewards": batch.rewards,
        "outcomes": batch.verdicts.outcomes,
        "errors": batch.verdicts.errors,
        "example_ids": [example.id for example in batch.examples],
        **asdict(batch.rollouts),
    }
    run.world.on_main(lambda: torch.save(dump, path))
    raise FloatingPointError(
        f"loss and gradient norm must be finite, got loss {loss} and gradient norm {grad_norm} at "
        f"step {step}: stopped before the optimiser step; the batch is in {path}, which `python -m "
        "kdrl_train replay --file` takes apart. --resume would repeat the step: start a new run, "
        "e.g. with a lower optim.learning_rate"
    )
