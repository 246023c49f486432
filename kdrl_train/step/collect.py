"""From a step's prompts to its batch: each rank samples and verifies its share; all get all."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kdrl_train.batch import Batch, Example, JudgedRollouts
from kdrl_train.config import DataConfig, SamplingConfig
from kdrl_train.errors import RewardError
from kdrl_train.model.teacher.remote import RemoteTeacher, may_query_early
from kdrl_train.rollouts.engines import require_version
from kdrl_train.rollouts.problems import encode_prompt, step_indices
from kdrl_train.rollouts.sampler import SampleRequest
from kdrl_train.runfolder.log import Stages
from kdrl_train.runfolder.signals import Stopped
from kdrl_train.step.run import Run


def collect(run: Run, step: int, stages: Stages) -> Batch:
    """The step's prompts, a function of (seed, step), R completions of the policy, their rewards;
    drawn now, or prefetch, while the step before trained.

    Raises: Stopped where a signal came to any rank; EngineError for an engine with other weights;
        RewardError where the reward function failed on all completions of a prompt.
    """
    require_version(run.engine, step)
    drawn = None if run.prefetch is None else run.prefetch.drawn.get(step)
    if drawn is None:
        own = partial(draw, run, step, stages, run.interrupt.poll)
        found, staleness = gather(run, own, stages), 0
    else:
        found, staleness = drawn.found, step - drawn.version
    size = run.config.sampling.group_size
    batch = Batch(
        examples=[example for example in _examples(run, step) for _ in range(size)],
        rollouts=found.rollouts,
        verdicts=found.verdicts,
        rewards=torch.tensor(found.verdicts.rewards, dtype=torch.float64).view(-1, size),
        teacher_logprobs=found.teacher_logprobs,
        staleness=staleness,
    )
    _require_rewards(run, batch, step)
    return batch


def draw(run: Run, step: int, stages: Stages, poll: Callable[[], None]) -> JudgedRollouts:
    """This rank's share of the step's completions, from the weights that the engine has now. No
    collective: it may run in a thread.

    poll: called now and then; what it raises ends the drawing.
    """
    config, examples = run.config, _examples(run, step)
    known = len(run.history.kl) == step or not config.method.kd_coef.reads_history
    early = run.remote and known and may_query_early(config.method, step, run.history)
    teacher = run.remote if early else None  # it scores while the rewards are computed
    return _own_part(run, examples, config.data, config.sampling, step, stages, teacher, poll)


def gather(run: Run, make: Callable[[], JudgedRollouts], stages: Stages) -> JudgedRollouts:
    """make() of all ranks, in their order. All call it together; where one was Stopped, all are."""
    ended: list[float] = []

    def own_part() -> JudgedRollouts | None:
        try:
            return make()
        except Stopped:
            return None
        finally:
            ended.append(time.perf_counter())

    parts = run.world.share(own_part)
    run.waited(stages, ended[0])
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        raise Stopped
    return JudgedRollouts.join(whole)


def sample_and_judge(
    run: Run,
    examples: list[Example],
    data: DataConfig,
    sampling: SamplingConfig,
    step: int,
    stages: Stages,
) -> JudgedRollouts:
    """G judged completions of each example, in order, each rank's share sampled and verified there.

    All ranks call it together, and get the parts of all. A signal to any of them raises Stopped.
    """
    poll = run.interrupt.poll
    return gather(
        run, lambda: _own_part(run, examples, data, sampling, step, stages, None, poll), stages
    )


def _examples(run: Run, step: int) -> list[Example]:
    """P, of a step."""
    count = run.config.sampling.prompts_per_step
    indices = step_indices(len(run.examples), run.config.seed, step, count)
    return [run.examples[i] for i in indices]


def _own_part(
    run: Run,
    examples: list[Example],
    data: DataConfig,
    sampling: SamplingConfig,
    step: int,
    stages: Stages,
    teacher: RemoteTeacher | None,
    poll: Callable[[], None],
) -> JudgedRollouts:
    """This rank's share of the examples. teacher: is asked about all of them."""
    rank, ranks = run.world.rank, run.world.size
    first, end = (len(examples) * place // ranks for place in (rank, rank + 1))
    examples = examples[first:end]
    prompts = [encode_prompt(run.tokenizer, example, data) for example in examples]
    with stages("rollout"):
        request = SampleRequest(
            prompts=prompts, sampling=sampling, seed=run.config.seed, step=step, first=first
        )
        rollouts = run.engine.generate(request, poll)
    poll()
    everybody = torch.ones(len(rollouts.texts), dtype=torch.bool)
    asked = {} if teacher is None else teacher.query(rollouts, everybody)
    golds = [example.gold for example in examples for _ in range(sampling.group_size)]
    with stages("verify"):
        verdicts = run.verifier.score(rollouts.texts, golds, poll)
    scores: list[Tensor | None] = [None] * len(everybody)
    if teacher is not None:
        with stages("teacher"):
            scores = teacher.collect(rollouts, everybody, asked, poll)
    return JudgedRollouts(rollouts, verdicts, scores)


def _require_rewards(run: Run, batch: Batch, step: int) -> None:
    """Log the first failure of the reward function; raise ValueError for a prompt without any."""
    errors, rewards, size = batch.verdicts.errors, batch.rewards, run.config.sampling.group_size
    if errors:
        r, message = next(iter(errors.items()))
        failed = f"step {step + 1}: {len(errors)} of {rewards.numel()} rewards failed"
        run.log.event("rewards", f"{failed}; first: {batch.examples[r].id}: {message}")
    for group in rewards.isnan().all(dim=1).nonzero().flatten().tolist():
        raise RewardError(
            f"reward.function must return a number for some completion of each prompt, got none "
            f"for the {size} of {batch.examples[group * size].id} at step {step}; first: "
            f"{errors[group * size]}: correct the function, or remove the row"
        )
