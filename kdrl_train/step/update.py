"""The update: a step's batch through the loss, micro-batch by micro-batch, to the new weights."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from kdrl_train.batch import Batch
from kdrl_train.errors import MidStepError, RunError
from kdrl_train.method import grpo
from kdrl_train.method.histogram import coarse
from kdrl_train.method.metrics import add_sums, token_means
from kdrl_train.model.fsdp import full
from kdrl_train.model.packing import PackedBatch, pack
from kdrl_train.rollouts.engines import require_agreement
from kdrl_train.runfolder.log import Stages
from kdrl_train.step.coefficients import Terms, prepare
from kdrl_train.step.gradient_split import gradient_split
from kdrl_train.step.run import Run
from kdrl_train.step.samples import SampleRecorder


def update(
    run: Run, batch: Batch, step: int, stages: Stages, trace: SampleRecorder | None = None
) -> dict[str, Any]:
    """The step's optimiser updates, of one part of its prompts each; returns their metrics.

    trace: keeps what the passes find of the completions that it has chosen.

    Raises: FloatingPointError, RunError or Stopped before the first optimiser step; MidStepError
        before a later one.
    """
    config = run.config
    trace = trace or SampleRecorder(0, 0)
    terms = prepare(run, batch, step, stages, trace)
    trace.advantages, trace.kd_weight = terms.advantages, terms.kd_weight
    sums: dict[str, Tensor] = {}
    losses, norms, measured = [], [], {}
    for part, rewards_R in enumerate(
        grpo.minibatches(batch.rewards, config.optim.updates_per_rollout)
    ):
        try:
            found, loss, diagnosed = accumulate(
                run, batch, terms, rewards_R, step, part, stages, trace
            )
            if part == 0:
                measured = diagnosed
                gaps = {**token_means(found), **terms.metrics}
            with stages("update"):
                norm = clip(run)
                stop_if_not_finite(run, batch, terms, step, part, loss, norm)
            if part == 0 and run.prefetch is not None:
                measured |= run.prefetch.settle(run, batch, gaps, step, stages)
            gap = {**gaps, **measured}["sampler_mismatch_mean"]
            require_agreement(gap, config.engine.allowed_mismatch(config.model.dtype), step)
        except (FloatingPointError, RunError) as error:
            if part == 0:
                raise
            raise MidStepError(f"{error} (update {part + 1} of the step)") from error
        with stages("update"):
            rate = take_step(run, step)
        sums = add_sums(sums, found)
        losses.append(loss)
        norms.append(norm)
    distilled = "teacher_log_ratio_histogram" in sums
    return {
        **token_means(sums),
        **terms.metrics,
        **measured,
        "teacher_log_ratio_counts": coarse(sums["teacher_log_ratio_histogram"])
        if distilled
        else None,
        "loss": fmean(losses),
        "grad_norm": fmean(norms),
        "learning_rate": rate,
    }


def accumulate(
    run: Run,
    batch: Batch,
    terms: Terms,
    rewards_R: Tensor,
    step: int,
    part: int,
    stages: Stages,
    trace: SampleRecorder,
) -> tuple[dict[str, Tensor], float, dict[str, float | None]]:
    """Gradient of one update's loss, micro-batch by micro-batch -> token sums and loss of all
    ranks, and at the steps of log.diagnostics_every what is measured on the first micro-batch.

    Each micro-batch is divided by the normaliser of the whole update, so how it is cut does not
    matter; times the number of ranks, since FSDP2 averages gradients over them. One without
    distilled tokens costs no forward pass of the teacher.

    Args:
        rewards_R: [R], NaN for the completions of other updates.
        part: number of the update in the step; a signal is obeyed in the first alone.
    """
    config, policy, world = run.config, run.policy, run.world
    device = policy.device
    weights_R, normalizer = grpo.token_weights(
        batch.rollouts.lengths,
        rewards_R,
        config.method.token_weights,
        config.sampling.max_new_tokens,
    )
    normalizer = normalizer.to(device) / world.size
    sums: dict[str, Tensor] = {}
    measured: dict[str, float | None] = {}
    every = config.log.diagnostics_every
    loss = torch.zeros((), dtype=torch.float64, device=device)
    policy.train()
    rows = _rows(run, batch, terms, weights_R)
    for turn, row in enumerate(rows):
        if part == 0:
            run.stop_if_asked()
        packed = row.to(device)
        teacher = None
        if run.teacher and packed.needs_teacher:
            with stages("teacher"):
                teacher = run.teacher(packed)
        if every and step % every == 0 and part == turn == 0:
            with stages("diagnostics"):
                measured = gradient_split(policy, packed, normalizer, teacher)
        with stages("update"):
            out = policy(packed, normalizer, teacher)
            out.loss.backward()
            loss += out.loss.detach()
            sums = add_sums(sums, out.sums)
        trace.add(row, out)
    start = time.perf_counter()
    mean = world.sum({"loss": loss})["loss"].item() / world.size
    total = world.sum(sums, largest=("sampler_mismatch_max",))
    run.waited(stages, start)
    return total, mean, measured


def _rows(run: Run, batch: Batch, terms: Terms, weights_R: Tensor) -> Iterator[PackedBatch]:
    """This rank's micro-batches."""
    return pack(
        batch.rollouts,
        advantages_R=terms.advantages,
        weights_R=weights_R,
        kd_weight_R=terms.kd_weight,
        micro_batch_tokens=run.config.optim.micro_batch_tokens,
        rank=run.world.rank,
        ranks=run.world.size,
        old_logprobs=terms.old_logprobs,
        sampler_weights=terms.sampler_weights,
        teacher_logprobs=terms.teacher_logprobs,
        distil_eos=run.config.method.kd_eos == "keep",
    )


def clip(run: Run) -> float:
    """Scale the gradient down to max_grad_norm; returns its norm before, over all ranks."""
    limit = run.config.optim.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), limit)
    return full(norm).item()


def take_step(run: Run, step: int) -> float:
    """The optimiser step; returns its learning rate."""
    optim = run.config.optim
    rate = grpo.learning_rate(optim.learning_rate, optim.warmup_steps, step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return rate


def stop_if_not_finite(
    run: Run, batch: Batch, terms: Terms, step: int, part: int, loss: float, grad_norm: float
) -> None:
    """Raise FloatingPointError, with the step's batch dumped, unless both numbers are finite."""
    if torch.isfinite(torch.tensor([loss, grad_norm])).all():
        return
    path = run.config.out / f"failed_step_{step:06d}.pt"
    dump = {
        "step": step,
        "loss": loss,
        "grad_norm": grad_norm,
        "rewards": batch.rewards,
        "advantages": terms.advantages,
        "kd_weight": terms.kd_weight,
        "old_logprobs": terms.old_logprobs,
        "sampler_weights": terms.sampler_weights,
        "teacher_logprobs": terms.teacher_logprobs,
        "part": part,
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
