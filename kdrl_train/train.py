"""The training loop, to be read from top to bottom: sample, score, learn, log."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from kdrl_train import check, checkpoint, grpo
from kdrl_train.config import TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.data import Example, encode_prompt, step_indices
from kdrl_train.evaluate import evaluate
from kdrl_train.log import RunLog, Stages, peak_memory_bytes, read_rows
from kdrl_train.packing import pack
from kdrl_train.policy import Policy, Teacher
from kdrl_train.rollout import Rollouts, generate_rollouts
from kdrl_train.schedules import History, rebuild_history
from kdrl_train.terms import Terms, prepare
from kdrl_train.verifier import Verdicts, Verifier


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that lasts longer than a step."""

    config: TrainConfig
    tokenizer: Any
    policy: Policy
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer
    examples: list[Example]
    held_out: list[Example]
    verifier: Verifier
    log: RunLog
    history: History


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's completions with their rewards: what the update learns from."""

    examples: list[Example]
    """R, one per completion."""
    rollouts: Rollouts
    verdicts: Verdicts
    rewards: Tensor
    """rewards_PG [P, G] float64, NaN where the reward function failed."""


def main(config: TrainConfig, console: Console | None = None) -> Path:
    """Train; returns the run folder, with the final model in model/.

    Args:
        config: the whole run.
        console: where progress goes; None: standard output.
    Raises: ValueError for a configuration, data or models that do not fit together, a used folder
        without resume, resume without a checkpoint or with one of another configuration;
        FloatingPointError for a loss or gradient that is not finite, before the optimiser step.
    """
    newest = checkpoint.open_folder(config)
    torch.manual_seed(config.seed)
    with Verifier(config.reward) as verifier:
        loaded = check.load(config)
        check.require(check.preflight(config, loaded, verifier, gold=check.GOLD_AT_START))
        optimizer = make_optimizer(config, loaded.policy)
        first = 0
        if newest is not None:
            first = checkpoint.load(newest, model=loaded.policy, optimizer=optimizer, config=config)
        config.out.mkdir(parents=True, exist_ok=True)
        save_yaml(replace(config, resume=False), config.out / "config.yaml")
        run = Run(
            config=config,
            tokenizer=loaded.tokenizer,
            policy=loaded.policy,
            teacher=loaded.teacher,
            optimizer=optimizer,
            examples=loaded.examples,
            held_out=loaded.held_out,
            verifier=verifier,
            log=RunLog(config.out, first, config.steps, console),
            history=rebuild_history(
                config.method.schedules, read_rows(config.out), first, config.eval.every
            ),
        )
        run.log.say(f"{config.out}: steps {first + 1} to {config.steps}")
        for step in range(first, config.steps):
            train_step(run, step)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                save(run, step + 1)
        checkpoint.export(run.policy.model, run.tokenizer, config.out / "model")
    return config.out


def make_optimizer(config: TrainConfig, policy: Policy) -> torch.optim.Optimizer:
    """AdamW over all parameters of the policy."""
    return torch.optim.AdamW(
        policy.parameters(),
        lr=config.optim.learning_rate,
        betas=config.optim.betas,
        weight_decay=config.optim.weight_decay,
    )


def train_step(run: Run, step: int) -> None:
    """One optimiser step, from prompts to the log."""
    config, stages = run.config, Stages()
    if run.policy.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.policy.model.device)
    with stages("rollout"):
        examples, rollouts = sample(run, step)
    with stages("verify"):
        batch = score(run, examples, rollouts, step)
    terms = prepare(
        config, run.policy, run.teacher, rollouts, batch.rewards, step, run.history, stages
    )
    rate = grpo.learning_rate(config.optim.learning_rate, config.optim.warmup_steps, step)
    sums: dict[str, Tensor] = {}
    losses, grad_norms = [], []
    for rewards_R in grpo.minibatches(batch.rewards, config.optim.updates_per_rollout):
        part_sums, loss = accumulate(run, batch, terms, rewards_R, stages)
        sums = grpo.add_sums(sums, part_sums)
        losses.append(loss.item())
        with stages("update"):
            grad_norms.append(update(run, batch, step, losses[-1], rate))
    row = {
        "step": step,
        **step_metrics(batch, terms, sums),
        "loss": fmean(losses),
        "grad_norm": fmean(grad_norms),
        "learning_rate": rate,
    }
    done = step + 1
    if run.held_out and (done % config.eval.every == 0 or done == config.steps):
        with stages("eval"):
            row |= evaluation(run)
    run.log.samples(step, *sample_texts(batch), count=config.samples_per_step)
    row |= stages.metrics(tokens=int(batch.rollouts.lengths.sum()))
    run.log.step(row | {"peak_memory_bytes": peak_memory_bytes(run.policy.model.device)})
    run.history.add(row)


def update(run: Run, batch: Batch, step: int, loss: float, rate: float) -> float:
    """Clip the gradient, check it, move the weights; returns its norm before the clip."""
    grad_norm = torch.nn.utils.clip_grad_norm_(
        run.policy.parameters(), run.config.optim.max_grad_norm
    ).item()
    stop_if_not_finite(run, batch, step, loss, grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return grad_norm


def save(run: Run, done: int) -> None:
    """Checkpoint after `done` steps. The steps are in the log already: a run killed in between
    loses no row, and a resumed one drops those it will write again."""
    folder = checkpoint.save(
        run.config.out / "checkpoints",
        step=done,
        model=run.policy,
        optimizer=run.optimizer,
        config=run.config,
    )
    run.log.say(f"saved {folder}")


def sample(run: Run, step: int) -> tuple[list[Example], Rollouts]:
    """The step's prompts, a function of (seed, step), and R completions of the current policy."""
    config = run.config
    indices = step_indices(len(run.examples), config.seed, step, config.sampling.prompts_per_step)
    examples = [run.examples[i] for i in indices]
    prompts = [encode_prompt(run.tokenizer, example, config.data) for example in examples]
    with run.policy.autocast():
        rollouts = generate_rollouts(
            run.policy.model,
            run.tokenizer,
            prompts,
            config.sampling,
            config.seed,
            step,
            vocab_size=run.policy.limit,
        )
    return [e for e in examples for _ in range(config.sampling.group_size)], rollouts


def score(run: Run, examples: list[Example], rollouts: Rollouts, step: int) -> Batch:
    """Rewards of R completions, from the verifier's processes; the first failure is logged.

    Raises: ValueError where the reward function failed on all completions of a prompt.
    """
    verdicts = run.verifier.score(rollouts.texts, [example.answer for example in examples])
    size = run.config.sampling.group_size
    rewards = torch.tensor(verdicts.rewards, dtype=torch.float64).view(-1, size)
    if verdicts.errors:
        r, message = next(iter(verdicts.errors.items()))
        failed = f"step {step + 1}: {len(verdicts.errors)} of {rewards.numel()} rewards failed"
        run.log.say(f"{failed}; first: {examples[r].id}: {message}")
    for group in rewards.isnan().all(dim=1).nonzero().flatten().tolist():
        raise ValueError(
            f"reward.function must return a number for some completion of each prompt, got none "
            f"for the {size} of {examples[group * size].id} at step {step}; first: "
            f"{verdicts.errors[group * size]}: correct the function, or remove the row"
        )
    return Batch(examples, rollouts, verdicts, rewards)


def accumulate(
    run: Run, batch: Batch, terms: Terms, rewards_R: Tensor, stages: Stages
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of one update's loss, micro-batch by micro-batch -> token sums, loss (0-d float64).

    rewards_R [R] is NaN for the completions of other updates. Each micro-batch is divided by the
    normaliser of the whole update, so how it is cut does not matter. One without distilled tokens
    costs no forward pass of the teacher.
    """
    config, policy = run.config, run.policy
    device = policy.model.device
    weights_R, normalizer = grpo.token_weights(
        batch.rollouts.lengths,
        rewards_R,
        config.method.token_weights,
        config.sampling.max_new_tokens,
    )
    normalizer = normalizer.to(device)
    sums: dict[str, Tensor] = {}
    loss = torch.zeros((), dtype=torch.float64, device=device)
    policy.train()
    for rows in pack(
        batch.rollouts,
        advantages_R=terms.advantages,
        weights_R=weights_R,
        kd_weight_R=terms.kd_weight,
        micro_batch_tokens=config.optim.micro_batch_tokens,
        old_logprobs=terms.old_logprobs,
        sampler_weights=terms.sampler_weights,
    ):
        needs_teacher, packed = rows.needs_teacher, rows.to(device)
        with stages("teacher"):
            teacher = run.teacher(packed) if run.teacher and needs_teacher else None
        with stages("update"):
            out = policy(packed, normalizer, teacher)
            out.loss.backward()
            loss += out.loss.detach()
            sums = grpo.add_sums(sums, out.sums)
    return sums, loss


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
    torch.save(dump, path)
    raise FloatingPointError(
        f"loss and gradient norm must be finite, got loss {loss} and gradient norm {grad_norm} at "
        f"step {step}: stopped before the optimiser step; the batch is in {path}. --resume would "
        "repeat the step: start a new run, e.g. with a lower optim.learning_rate"
    )


def step_metrics(batch: Batch, terms: Terms, sums: dict[str, Tensor]) -> dict[str, float | None]:
    """What the step's completions and tokens say about the policy."""
    rollouts = batch.rollouts
    return {
        **grpo.reward_metrics(batch.rewards),
        "response_length": rollouts.lengths.double().mean().item(),
        "truncated": rollouts.truncated.double().mean().item(),
        **grpo.token_means(sums),
        **terms.metrics,
        **{f"verifier_{name}": count for name, count in batch.verdicts.counts.items()},
    }


def evaluation(run: Run) -> dict[str, float]:
    """Metrics of the held-out problems."""
    config = run.config
    with run.policy.autocast():
        return evaluate(
            run.policy.model,
            run.tokenizer,
            run.held_out,
            data=config.eval.data,
            sampling=config.sampling,
            verifier=run.verifier,
            samples=config.eval.samples,
            seed=config.seed,
            vocab_size=run.policy.limit,
        ).metrics()


def sample_texts(batch: Batch) -> tuple[Rollouts, list[str], list[str], Tensor]:
    """What RunLog.samples writes: rollouts, prompts, answers, rewards [R]."""
    prompts = [example.prompt for example in batch.examples]
    answers = [example.answer for example in batch.examples]
    return batch.rollouts, prompts, answers, batch.rewards.flatten()
