"""From a step's prompts to its batch: each rank samples and verifies its share; all get all."""

import torch

from kdrl_train.data import encode_prompt, step_indices
from kdrl_train.engines import require_version
from kdrl_train.interrupt import Stopped
from kdrl_train.log import Stages
from kdrl_train.rollout import Rollouts
from kdrl_train.run import Batch, Run
from kdrl_train.verifier import Verdicts


def collect(run: Run, step: int, stages: Stages) -> Batch:
    """The step's prompts, a function of (seed, step), R completions of the policy, their rewards.

    Raises: Stopped where a signal came to any rank; EngineError for an engine with other weights;
        ValueError where the reward function failed on all completions of a prompt.
    """
    config = run.config
    require_version(run.engine, step)
    indices = step_indices(len(run.examples), config.seed, step, config.sampling.prompts_per_step)
    parts = run.world.share(lambda: _own_part(run, indices, step, stages))
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        raise Stopped
    batch = _join(run, [run.examples[i] for i in indices], whole)
    _require_rewards(run, batch, step)
    return batch


def _own_part(
    run: Run, indices: list[int], step: int, stages: Stages
) -> tuple[Rollouts, Verdicts] | None:
    """This rank's prompts, in order; None if a signal came."""
    rank, ranks = run.world.rank, run.world.size
    first, end = (len(indices) * place // ranks for place in (rank, rank + 1))
    examples = [run.examples[i] for i in indices[first:end]]
    prompts = [encode_prompt(run.tokenizer, example, run.config.data) for example in examples]
    sampling = run.config.sampling
    try:
        with stages("rollout"):
            rollouts = run.engine.generate(
                prompts,
                sampling,
                seed=run.config.seed,
                step=step,
                first=first,
                poll=run.interrupt.poll,
            )
        run.interrupt.poll()
    except Stopped:
        return None
    answers = [example.answer for example in examples for _ in range(sampling.group_size)]
    with stages("verify"):
        return rollouts, run.verifier.score(rollouts.texts, answers)


def _join(run: Run, prompts: list, parts: list[tuple[Rollouts, Verdicts]]) -> Batch:
    """All parts, in the order of the prompts."""
    size = run.config.sampling.group_size
    verdicts = Verdicts.join([verdicts for _, verdicts in parts])
    return Batch(
        examples=[example for example in prompts for _ in range(size)],
        rollouts=Rollouts.join([rollouts for rollouts, _ in parts]),
        verdicts=verdicts,
        rewards=torch.tensor(verdicts.rewards, dtype=torch.float64).view(-1, size),
    )


def _require_rewards(run: Run, batch: Batch, step: int) -> None:
    """Log the first failure of the reward function; raise ValueError for a prompt without any."""
    errors, rewards, size = batch.verdicts.errors, batch.rewards, run.config.sampling.group_size
    if errors:
        r, message = next(iter(errors.items()))
        failed = f"step {step + 1}: {len(errors)} of {rewards.numel()} rewards failed"
        run.log.say(f"{failed}; first: {batch.examples[r].id}: {message}")
    for group in rewards.isnan().all(dim=1).nonzero().flatten().tolist():
        raise ValueError(
            f"reward.function must return a number for some completion of each prompt, got none "
            f"for the {size} of {batch.examples[group * size].id} at step {step}; first: "
            f"{errors[group * size]}: correct the function, or remove the row"
        )
