"""Updates the policy: takes a step's batch through the loss, micro-batch by micro-batch."""

import time
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train import output
from kdrl_train.batch import Batch, CompletionCoefficients
from kdrl_train.config import TrainConfig
from kdrl_train.copies import to_device
from kdrl_train.errors import MidStepError, RunError
from kdrl_train.method import grpo
from kdrl_train.method.config import MethodConfig
from kdrl_train.method.histogram import coarse
from kdrl_train.method.metrics import LARGEST, add_sums, teacher_sums, token_means
from kdrl_train.model.fsdp import full
from kdrl_train.model.packing import PackedBatch
from kdrl_train.model.policy import Policy
from kdrl_train.rollouts.engines import require_agreement
from kdrl_train.runfolder.finite import require_finite
from kdrl_train.runfolder.log import LEARNING, Stages
from kdrl_train.step.coefficients import packs_of, prepare
from kdrl_train.step.gradient_split import gradient_split
from kdrl_train.step.run import Run
from kdrl_train.step.samples import SampleRecorder
from kdrl_train.step.score import MISMATCH, probe_mismatch


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What every update of one step reads."""

    run: Run
    batch: Batch
    coefficients: CompletionCoefficients
    step: int
    """From 0."""
    stages: Stages
    recorder: SampleRecorder


@dataclass(frozen=True, slots=True)
class Accumulated:
    """What the micro-batches of one update add up to, over all ranks."""

    sums: dict[str, Tensor]
    """policy.token_sums."""
    loss: float
    split: dict[str, float | None]
    """with_split of the first micro-batches, at the steps of log.diagnostics_every."""


def update(
    run: Run, batch: Batch, step: int, stages: Stages, recorder: SampleRecorder | None = None
) -> dict[str, Any]:
    """Make the step's optimiser updates, of one part of its prompts each; returns their metrics.

    recorder: keeps what the passes compute of the completions that it has chosen.

    Raises: FloatingPointError, RunError or Stopped before the first optimiser step; MidStepError
        before a later one, or where the last one has broken the weights.
    """
    config, recorder = run.config, recorder or SampleRecorder(0, 0)
    prepared = prepare(run, batch, step, stages, recorder)
    recorder.coefficients = prepared.coefficients
    inputs = StepInputs(run, batch, prepared.coefficients, step, stages, recorder)
    P, G = batch.rewards.shape
    sums: dict[str, Tensor] = {}
    losses, norms, measured = [], [], {}
    for part, used_R in enumerate(grpo.minibatches(P, G, config.optim.updates_per_rollout)):
        try:
            accumulated = accumulate(inputs, used_R, part)
            with stages("update"):
                norm = clip(run.policy, config.optim.max_grad_norm)
                stop_if_not_finite(inputs, part, accumulated.loss, norm)
            if part == 0:
                first = token_means(accumulated.sums) | prepared.metrics
                measured = accumulated.split | mismatch_metrics(inputs, first)
                mismatch = (first | measured)["sampler_mismatch_mean"]
            require_agreement(mismatch, config.engine.allowed_mismatch(config.model.dtype), step)
        except (FloatingPointError, RunError) as error:
            if part == 0:
                raise
            raise MidStepError(f"{error} (update {part + 1} of the step)") from error
        run.position.begun = True
        with stages("update"):
            rate = take_step(run.optimizer, config, step)
            run.teachers.follow(run.policy)
        sums = add_sums(sums, accumulated.sums)
        losses.append(accumulated.loss)
        norms.append(norm)
    if config.is_saved(step + 1):  # here, while the batch is at hand
        require_finite(
            run.policy,
            run.optimizer,
            step + 1,
            run.world,
            lambda: dump(inputs, part, losses[-1], norm),
        )
    histogram = sums.get("teacher_log_ratio_histogram")
    return {
        **token_means(sums, run.teachers.routed),
        **prepared.metrics,
        **measured,
        "teacher_log_ratio_counts": None if histogram is None else coarse(histogram),
        "loss": fmean(losses),
        "grad_norm": fmean(norms),
        "learning_rate": rate,
    }


def accumulate(inputs: StepInputs, used_R: Tensor, part: int) -> Accumulated:
    """Add up the gradient of one update's loss, micro-batch by micro-batch.

    Each micro-batch is divided by the normaliser of the whole update, so how it is cut does not
    matter; times the number of ranks with packs of their own, since FSDP2 averages gradients over
    them. One without distilled tokens costs no forward pass of the teacher.

    Args:
        used_R: [R] bool, the completions of this update; those without a reward are left out too.
        part: number of the update in the step; a signal is obeyed in the first alone.
    """
    run, batch, stages = inputs.run, inputs.batch, inputs.stages
    config, policy, world = run.config, run.policy, run.world
    device = policy.device
    weights_R, normalizer = grpo.token_weights(
        batch.rollouts.lengths,
        used_R & ~batch.rewards.isnan().flatten(),
        config.method.token_weights,
        config.sampling.max_new_tokens,
    )
    normalizer = to_device(normalizer / world.data_size, device)
    sums: dict[str, Tensor] = {}
    split: dict[str, float | None] = {}
    every = config.log.diagnostics_every
    loss = torch.zeros((), dtype=torch.float64, device=device)
    policy.train()
    coefficients = replace(inputs.coefficients, token_weights=weights_R)
    seed = sketch_seed(config.seed, inputs.step, part)
    policy.draw_sketch(seed, sketch_scale(coefficients, config.method))
    learnt, used = 0, int((weights_R != 0).sum())
    for micro_batch in packs_of(batch, coefficients, config, world):
        if part == 0:
            run.stop_if_signalled()
        packed = micro_batch.to(device)
        teacher = None
        if run.teachers.runs(packed):
            with stages("teacher"):
                teacher = run.teachers.head(packed)
        if every and inputs.step % every == 0 and part == 0:
            split = with_split(inputs, split, packed, normalizer, teacher)
        with stages("update"):
            out = policy(packed, normalizer, teacher)
            out.loss.backward()
            loss += out.loss.detach()
            sums = add_sums(sums, out.sums)
            if run.teachers.several:
                name = run.teachers.names[packed.teacher]
                sums = add_sums(sums, teacher_sums(out.sums, name))
        inputs.recorder.add(micro_batch, out)
        learnt += len(micro_batch.rollout.unique())
        output.count(LEARNING, learnt, used if world.size == 1 else None, " completions")
    stages.settle()  # or the wait for this rank's GPU would count as one for other ranks
    start = time.perf_counter()
    total = world.sum(sums | {"loss": loss}, largest=LARGEST)  # together: the host waits once
    mean = total.pop("loss").item() / world.data_size
    run.waited(stages, start)
    return Accumulated(total, mean, split)


def with_split(
    inputs: StepInputs,
    split: dict[str, float | None],
    packed: PackedBatch,
    normalizer: Tensor,
    teacher: kk.TeacherHead | None,
) -> dict[str, float | None]:
    """Add gradient_split of a pack to those of the step, if it is the first pack of its teacher.

    Several teachers have numbers of their own, `rl_grad_norm/NAME`; those without a name are of the
    step's first pack.
    """
    run = inputs.run
    end = f"/{run.teachers.names[packed.teacher]}" if run.teachers.several else ""
    if f"rl_grad_norm{end}" in split:
        return split
    with inputs.stages("diagnostics"):
        numbers = gradient_split(run.policy, packed, normalizer, teacher)
    return numbers | split | {f"{name}{end}": value for name, value in numbers.items()}


def sketch_seed(seed: int, step: int, part: int) -> int:
    """Return the seed of the sketch of one update of a step, another one for each."""
    return (seed << 40) + (step << 8) + part


def sketch_scale(coefficients: CompletionCoefficients, method: MethodConfig) -> float:
    """Return the size of a usual coefficient, above which the sketch keeps its threshold.

    It is the root mean square of weight · (advantage² + kd weight²)^½ over the completions where it
    is not 0, so that neither a small beta nor weights of 1 / length make the sketch coarse; 1
    where it is 0 everywhere.
    """
    advantages = coefficients.advantages * (method.policy != "off")
    size_R = torch.hypot(advantages, coefficients.kd_weight)
    used = (coefficients.token_weights != 0) & (size_R != 0)
    sizes = (coefficients.token_weights * size_R)[used].double()
    return sizes.square().mean().sqrt().item() if len(sizes) else 1.0


def mismatch_metrics(inputs: StepInputs, first: dict[str, float | None]) -> dict[str, float | None]:
    """Report how far the sampler's log-probabilities are from the trainer's, where the rollouts of
    the next step are drawn while this one trains; empty where they are not.

    sampler_mismatch_mean and _max are measured before any update, on a few completions of the next
    step, which this waits for. The last step has no next one: it uses its own completions, or None
    if they are stale. seconds_prefetch is what the thread took. All ranks call it together.

    Args:
        first: metrics of the step's first update. For stale completions the mismatch includes the
            change by one optimiser step.
    Raises: what the thread raised, RankError where that was on another rank; Stopped.
    """
    run, stale = inputs.run, inputs.batch.staleness
    if run.prefetch is None:
        return {}
    metrics = {name: None if stale else first[name] for name in MISMATCH}
    judged = run.prefetch.receive(run.gather, inputs.stages)
    if judged is not None:
        with inputs.stages("score"):
            metrics = probe_mismatch(run.policy, judged.rollouts, run.config, run.world)
    return {
        **metrics,
        "staleness": stale,
        "stale_sampler_mismatch_mean": first["sampler_mismatch_mean"] if stale else None,
        "seconds_prefetch": run.prefetch.seconds,
    }


def clip(policy: Policy, max_norm: float) -> float:
    """Scale the gradient down to max_norm; returns its norm before, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return full(norm).item()


def take_step(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> float:
    """Take the optimiser step; returns its learning rate."""
    rate = config.optim.rate_at(step, config.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return rate


def stop_if_not_finite(inputs: StepInputs, part: int, loss: float, grad_norm: float) -> None:
    """Raise FloatingPointError, with the step's batch dumped, unless both numbers are finite."""
    if torch.isfinite(torch.tensor([loss, grad_norm])).all():
        return
    step, where = inputs.step, dump(inputs, part, loss, grad_norm)
    raise FloatingPointError(
        f"loss and gradient norm must be finite, got loss {loss} and gradient norm {grad_norm} at "
        f"step {step}: stopped before the optimiser step; {where}. --resume would repeat the step: "
        "start a new run, e.g. with a lower optim.learning_rate"
    )


def dump(inputs: StepInputs, part: int, loss: float, grad_norm: float) -> str:
    """Write what `replay` reads of the step's batch; returns a clause that says where, or why not:
    that must not hide what broke the step. All ranks call it."""
    run, batch, step = inputs.run, inputs.batch, inputs.step
    path = run.config.out / f"failed_step_{step:06d}.pt"
    # replay asks a server again for what is large, and different on each rank
    kept = replace(inputs.coefficients, teacher_states=None, teacher_topk=None)
    state = {
        "step": step,
        "part": part,
        "loss": loss,
        "grad_norm": grad_norm,
        "rewards": batch.rewards,
        "outcomes": batch.verdicts.outcomes,
        "errors": batch.verdicts.errors,
        "example_ids": [example.id for example in batch.examples],
        "coefficients": asdict(kept),
        **asdict(batch.rollouts),
    }
    try:
        run.world.on_main(lambda: torch.save(state, path))
    except (OSError, RuntimeError) as error:  # which torch.save raises where the disk is full
        return f"the batch cannot be written to {path}: {str(error).partition(chr(10))[0]}"
    return f"the batch is in {path}, which `python -m kdrl_train replay --file` takes apart"
