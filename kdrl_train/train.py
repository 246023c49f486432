"""The training loop, to be read from top to bottom: sample, score, learn, log."""

from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from kdrl_train import check, checkpoint, grpo
from kdrl_train.config import TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.data import Example, encode_prompt, step_indices
from kdrl_train.evaluate import evaluate
from kdrl_train.log import RunLog, Stages, peak_memory_bytes
from kdrl_train.packing import pack
from kdrl_train.policy import Policy, Teacher
from kdrl_train.rollout import Rollouts, generate_rollouts
from kdrl_train.teacher_client import TeacherError
from kdrl_train.teachers import RemoteTeacher, may_ask_early
from kdrl_train.verifier import Verdicts, Verifier


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that lasts longer than a step."""

    config: TrainConfig
    tokenizer: Any
    policy: Policy
    teacher: Teacher | None
    remote: RemoteTeacher | None
    """The teacher, where it is behind a URL."""
    optimizer: torch.optim.Optimizer
    examples: list[Example]
    held_out: list[Example]
    verifier: Verifier
    log: RunLog


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's completions with their rewards: what the update learns from."""

    examples: list[Example]
    """R, one per completion."""
    rollouts: Rollouts
    verdicts: Verdicts
    rewards: Tensor
    """rewards_PG [P, G] float64, NaN where the reward function failed."""
    asked: dict[int, Future[Tensor]] = field(default_factory=dict)
    """Completion -> its teacher log-probabilities [T], where a server was asked early."""


def main(config: TrainConfig, console: Console | None = None) -> Path:
    """Train; returns the run folder, with the final model in model/.

    Args:
        config: the whole run.
        console: where progress goes; None: standard output.
    Raises: ValueError for a configuration, data or models that do not fit together, a used folder
        without resume, resume without a checkpoint or with one of another configuration;
        FloatingPointError for a loss or gradient that is not finite, before the optimiser step;
        TeacherError for a teacher's server that stays away, with a checkpoint of the steps done.
    """
    newest = checkpoint.open_folder(config)
    torch.manual_seed(config.seed)
    with Verifier(config.reward) as verifier, ExitStack() as stack:
        loaded = stack.enter_context(closing(check.load(config)))
        check.require(check.preflight(config, loaded, verifier, gold=check.GOLD_AT_START))
        optimizer = make_optimizer(config, loaded.policy)
        first = 0
        if newest is not None:
            first = checkpoint.load(newest, model=loaded.policy, optimizer=optimizer, config=config)
        config.out.mkdir(parents=True, exist_ok=True)
        save_yaml(replace(config, resume=False), config.out / "config.yaml")
        log = RunLog(config.out, first, config.steps, console)
        remote = None
        if loaded.server is not None:
            remote = stack.enter_context(
                RemoteTeacher(loaded.server, config, loaded.policy.limit, log.say)
            )
        run = Run(
            config=config,
            tokenizer=loaded.tokenizer,
            policy=loaded.policy,
            teacher=loaded.teacher,
            remote=remote,
            optimizer=optimizer,
            examples=loaded.examples,
            held_out=loaded.held_out,
            verifier=verifier,
            log=log,
        )
        run.log.say(f"{config.out}: steps {first + 1} to {config.steps}")
        for step in range(first, config.steps):
            try:
                train_step(run, step)
            except TeacherError:
                save(run, step)
                raise
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
    asked = {}
    if run.remote and may_ask_early(config.method, step):  # it scores while the rewards are made
        asked = run.remote.ask(rollouts, torch.ones(len(rollouts.texts), dtype=torch.bool))
    with stages("verify"):
        batch = replace(score(run, examples, rollouts, step), asked=asked)
    sums, loss = accumulate(run, batch, step, stages)
    with stages("update"):
        grad_norm = torch.nn.utils.clip_grad_norm_(
            run.policy.parameters(), config.optim.max_grad_norm
        )
        stop_if_not_finite(run, batch, step, loss.item(), grad_norm.item())
        rate = grpo.learning_rate(config.optim.learning_rate, config.optim.warmup_steps, step)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
    row = {
        "step": step,
        **step_metrics(run, batch, step, sums),
        "loss": loss.item(),
        "grad_norm": grad_norm.item(),
        "learning_rate": rate,
    }
    done = step + 1
    if run.held_out and (done % config.eval.every == 0 or done == config.steps):
        with stages("eval"):
            row |= evaluation(run)
    run.log.samples(step, *sample_texts(batch), count=config.samples_per_step)
    row |= stages.metrics(tokens=int(batch.rollouts.lengths.sum()))
    run.log.step(row | {"peak_memory_bytes": peak_memory_bytes(run.policy.model.device)})


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
    run: Run, batch: Batch, step: int, stages: Stages
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of the step's loss, micro-batch by micro-batch -> token sums, loss (0-d float64).

    Each micro-batch is divided by the normaliser of the whole step, so how it is cut does not
    matter. One without distilled tokens costs no forward pass of the teacher, a completion without
    no call of its server.
    """
    config, policy = run.config, run.policy
    device = policy.model.device
    advantages_R, kd_weight_R = grpo.completion_terms(batch.rewards, config.method, step)
    weights_R, normalizer = grpo.token_weights(
        batch.rollouts.lengths,
        batch.rewards.flatten(),
        config.method.token_weights,
        config.sampling.max_new_tokens,
    )
    normalizer = normalizer.to(device)
    scores = None
    if run.remote:
        with stages("teacher"):
            wanted_R = (kd_weight_R > 0) & (weights_R > 0)
            scores = run.remote.collect(batch.rollouts, wanted_R, batch.asked)
    sums: dict[str, Tensor] = {}
    loss = torch.zeros((), dtype=torch.float64, device=device)
    policy.train()
    for rows in pack(
        batch.rollouts,
        advantages_R=advantages_R,
        weights_R=weights_R,
        kd_weight_R=kd_weight_R,
        micro_batch_tokens=config.optim.micro_batch_tokens,
        teacher_logprobs=scores,
        distil_eos=config.method.kd_eos == "keep",
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


def step_metrics(
    run: Run, batch: Batch, step: int, sums: dict[str, Tensor]
) -> dict[str, float | None]:
    """What the step's completions and tokens say about the policy."""
    method, rollouts = run.config.method, batch.rollouts
    beta = None if method.kd is None else grpo.schedule_value(method.kd_coef, step)
    return {
        **grpo.reward_metrics(batch.rewards),
        "response_length": rollouts.lengths.double().mean().item(),
        "truncated": rollouts.truncated.double().mean().item(),
        **grpo.token_means(sums),
        "kd_coef": beta,
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
