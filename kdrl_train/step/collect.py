"""Collects a step's batch: each rank samples and verifies its share, and all get the whole."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from kdrl_train.batch import Batch, Example, JudgedRollouts, Rollouts, TeacherReply, Verdicts
from kdrl_train.config import DataConfig, SamplingConfig, TrainConfig
from kdrl_train.config.rollouts import OVERLONG
from kdrl_train.errors import RewardError
from kdrl_train.method.overlong import overlong_fines
from kdrl_train.model.teacher.remote import may_query_early
from kdrl_train.output import meter
from kdrl_train.rollouts.engines import require_version
from kdrl_train.rollouts.problems import ProblemSet, encode_prompt, step_indices
from kdrl_train.rollouts.reward_inputs import reward_inputs
from kdrl_train.rollouts.sampler import SampleRequest
from kdrl_train.rollouts.teacher_prompts import as_teacher_reads
from kdrl_train.runfolder.log import ROLLOUTS, Stages
from kdrl_train.step.run import Run


def collect(run: Run, step: int, stages: Stages) -> Batch:
    """Collect the step's prompts, a function of (seed, step), with R completions and their rewards.

    The completions are drawn now or, by a prefetch, were drawn while the step before trained.

    Raises: Stopped where a signal came to any rank; EngineError for an engine with other weights;
        RewardError where the reward function failed on all completions of a prompt.
    """
    require_version(run.engine, step)
    drawn = None if run.prefetch is None else run.prefetch.drawn.get(step)
    if drawn is None:
        make_part = partial(draw, run, step, stages, run.interrupt.poll)
        judged, staleness = run.gather(make_part, stages), 0
    else:
        judged, staleness = drawn.judged, step - drawn.version
    verdicts = fined(judged.verdicts, judged.rollouts, run.config)
    size = run.config.sampling.group_size
    batch = Batch(
        examples=[
            example for example in examples_of(run.examples, run.config, step) for _ in range(size)
        ],
        rollouts=judged.rollouts,
        verdicts=verdicts,
        rewards=torch.tensor(verdicts.rewards, dtype=torch.float64).view(-1, size),
        teacher_replies=judged.teacher_replies,
        staleness=staleness,
    )
    _require_rewards(run, batch, step)
    return batch


def fined(verdicts: Verdicts, rollouts: Rollouts, config: TrainConfig) -> Verdicts:
    """Take the fines for length from the rewards, where reward.overlong_buffer is set."""
    reward = config.reward
    if not reward.overlong_buffer:
        return verdicts
    fines = overlong_fines(
        rollouts.lengths.tolist(),
        config.sampling.max_new_tokens,
        reward.overlong_buffer,
        reward.overlong_penalty,
    )
    return replace(
        verdicts,
        rewards=[value + fine for value, fine in zip(verdicts.rewards, fines, strict=True)],
        parts=verdicts.parts | {OVERLONG: fines},
    )


def draw(run: Run, step: int, stages: Stages, poll: Callable[[], None]) -> JudgedRollouts:
    """Draw and judge this rank's share of a step's completions, from the engine's present weights.

    It calls no collective, so that it may run in a thread.

    poll: called regularly; an exception that it raises stops the drawing.
    """
    config, examples = run.config, examples_of(run.examples, run.config, step)
    early = early_servers(run, step)  # they score while the rewards are computed
    return _draw_share(run, examples, config.data, config.sampling, step, stages, early, poll)


def early_servers(run: Run, step: int) -> frozenset[int]:
    """Return the numbers of the servers that distil each completion of the step, whatever its
    reward."""
    teachers, early = run.teachers, set()
    if not run.config.method.reads_logprobs and run.world.size > 1:
        return frozenset()  # states are large: each rank asks for those of its own packs, later
    for number in teachers.remote:
        method, history, weight = run.config.method, run.history, 1.0
        if teachers.several:
            name = teachers.names[number]
            weight = method.kd_weight(name)
            method, history = method.of_teacher(name), history.of_teacher(name)
        known = len(history.kl) == step or not method.kd_coef.reads_history
        if known and weight > 0 and may_query_early(method, step, history):
            early.add(number)
    return frozenset(early)


def sample_and_judge(
    run: Run,
    problems: ProblemSet,
    sampling: SamplingConfig,
    step: int,
    stages: Stages,
    *,
    greedy: bool,
) -> JudgedRollouts:
    """Sample and judge G completions of each problem, in order, each rank its share.

    All ranks call it together, and get the parts of all. A signal to any of them raises Stopped.

    greedy: as in SampleRequest.
    """
    part = run, problems.examples, problems.data, sampling, step, stages, frozenset[int]()
    poll = run.interrupt.poll
    return run.gather(lambda: _draw_share(*part, poll, greedy=greedy), stages)


def examples_of(examples: list[Example], config: TrainConfig, step: int) -> list[Example]:
    """Choose the P examples of a step."""
    count = config.sampling.prompts_per_step
    return [examples[i] for i in step_indices(len(examples), config.seed, step, count)]


def _draw_share(
    run: Run,
    examples: list[Example],
    data: DataConfig,
    sampling: SamplingConfig,
    step: int,
    stages: Stages,
    early: frozenset[int],
    poll: Callable[[], None],
    *,
    greedy: bool = False,
) -> JudgedRollouts:
    """Sample and judge this rank's share of the examples.

    early: numbers of the servers that are queried while the completions are judged, for all that
        they teach.
    """
    rank, ranks = run.world.rank, run.world.size
    first, end = (len(examples) * place // ranks for place in (rank, rank + 1))
    examples = examples[first:end]
    prompts = [encode_prompt(run.tokenizer, example, data) for example in examples]
    with stages("rollout"):
        request = SampleRequest(
            prompts=prompts,
            sampling=sampling,
            seed=run.config.seed,
            step=step,
            first=first,
            greedy=greedy,
            report=meter(ROLLOUTS, len(prompts) * sampling.group_size),
        )
        rollouts = run.engine.generate(request, poll)
    poll()
    of_R, teachers = [e for e in examples for _ in range(sampling.group_size)], run.teachers
    number_R = teachers.numbers(of_R) if early else torch.zeros(len(of_R), dtype=torch.int64)
    early_R = torch.tensor([number in early for number in number_R.tolist()], dtype=torch.bool)
    pending, scored = {}, rollouts
    if early:
        scored = as_teacher_reads(run.tokenizer, of_R, data, rollouts)
        pending = teachers.query(scored, early_R, number_R)
    golds = [example.gold for example in of_R]
    with stages("verify"):
        more = reward_inputs(run.verifier.inputs, of_R, rollouts, run.tokenizer)
        verdicts = run.verifier.score(rollouts.texts, golds, poll, more)
    replies: list[TeacherReply | None] = [None] * len(of_R)
    if early:
        with stages("teacher"):
            replies = teachers.collect(scored, early_R, number_R, pending, poll)
    return JudgedRollouts(rollouts, verdicts, replies)


def _require_rewards(run: Run, batch: Batch, step: int) -> None:
    """Log the first failure of the reward function; raise RewardError where it fails on a whole
    group."""
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
