"""From a step's prompts to its batch: each rank samples and verifies its share; all get all."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrl_train.config import DataConfig, SamplingConfig
from kdrl_train.data import Example, encode_prompt, step_indices
from kdrl_train.engines import require_version
from kdrl_train.errors import RewardError
from kdrl_train.interrupt import Stopped
from kdrl_train.log import Stages
from kdrl_train.rollout import Rollouts
from kdrl_train.run import Batch, Run
from kdrl_train.teachers import RemoteTeacher, may_ask_early
from kdrl_train.verifier import Verdicts


@dataclass(frozen=True, slots=True)
class Answered:
    """Judged completions of one rank."""

    rollouts: Rollouts
    verdicts: Verdicts
    teacher_logprobs: list[Tensor | None]
    """[T] nats of each, where its server was asked."""


def collect(run: Run, step: int, stages: Stages) -> Batch:
    """The step's prompts, a function of (seed, step), R completions of the policy, their rewards.

    Raises: Stopped where a signal came to any rank; EngineError for an engine with other weights;
        RewardError where the reward function failed on all completions of a prompt.
    """
    config = run.config
    require_version(run.engine, step)
    indices = step_indices(len(run.examples), config.seed, step, config.sampling.prompts_per_step)
    examples = [run.examples[i] for i in indices]
    early = run.remote and may_ask_early(config.method, step, run.history)
    teacher = run.remote if early else None  # it scores while the rewards are computed
    parts = answer(run, examples, config.data, config.sampling, step, stages, teacher)
    verdicts = Verdicts.join([part.verdicts for part in parts])
    size = config.sampling.group_size
    batch = Batch(
        examples=[example for example in examples for _ in range(size)],
        rollouts=Rollouts.join([part.rollouts for part in parts]),
        verdicts=verdicts,
        rewards=torch.tensor(verdicts.rewards, dtype=torch.float64).view(-1, size),
        teacher_logprobs=[logprobs for part in parts for logprobs in part.teacher_logprobs],
    )
    _require_rewards(run, batch, step)
    return batch


def answer(
    run: Run,
    examples: list[Example],
    data: DataConfig,
    sampling: SamplingConfig,
    step: int,
    stages: Stages,
    teacher: RemoteTeacher | None = None,
) -> list[Answered]:
    """G judged completions of each example, in order, each rank's share sampled and verified there.

    All ranks call it together, and get the parts of all. teacher: is asked about all of them. A
    signal to any of them raises Stopped.
    """

    ended: list[float] = []

    def own_part() -> Answered | None:
        rank, ranks = run.world.rank, run.world.size
        first, end = (len(examples) * place // ranks for place in (rank, rank + 1))
        try:
            share = examples[first:end]
            return _own_part(run, share, first, data, sampling, step, stages, teacher)
        except Stopped:
            return None
        finally:
            ended.append(time.perf_counter())

    parts = run.world.share(own_part)
    run.waited(stages, ended[0])
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        raise Stopped
    return whole


def _own_part(
    run: Run,
    examples: list[Example],
    first: int,
    data: DataConfig,
    sampling: SamplingConfig,
    step: int,
    stages: Stages,
    teacher: RemoteTeacher | None,
) -> Answered:
    """This rank's examples, of which the first is at place `first` of the step's."""
    poll = run.interrupt.poll
    prompts = [encode_prompt(run.tokenizer, example, data) for example in examples]
    with stages("rollout"):
        rollouts = run.engine.generate(
            prompts,
            sampling,
            seed=run.config.seed,
            step=step,
            first=first,
            poll=poll,
        )
    poll()
    everybody = torch.ones(len(rollouts.texts), dtype=torch.bool)
    asked = {} if teacher is None else teacher.ask(rollouts, everybody)
    answers = [example.answer for example in examples for _ in range(sampling.group_size)]
    with stages("verify"):
        verdicts = run.verifier.score(rollouts.texts, answers, poll)
    scores: list[Tensor | None] = [None] * len(everybody)
    if teacher is not None:
        with stages("teacher"):
            scores = teacher.collect(rollouts, everybody, asked, poll)
    return Answered(rollouts, verdicts, scores)


def _require_rewards(run: Run, batch: Batch, step: int) -> None:
    """Log the first failure of the reward function; raise ValueError for a prompt without any."""
    errors, rewards, size = batch.verdicts.errors, batch.rewards, run.config.sampling.group_size
    if errors:
        r, message = next(iter(errors.items()))
        failed = f"step {step + 1}: {len(errors)} of {rewards.numel()} rewards failed"
        run.log.say(f"{failed}; first: {batch.examples[r].id}: {message}")
    for group in rewards.isnan().all(dim=1).nonzero().flatten().tolist():
        raise RewardError(
            f"reward.function must return a number for some completion of each prompt, got none "
            f"for the {size} of {batch.examples[group * size].id} at step {step}; first: "
            f"{errors[group * size]}: correct the function, or remove the row"
        )
