"""Runs the training loop, to be read from top to bottom: sample, score, learn, log.

One process or many (torchrun): every rank runs all of this. After `collect` each holds the whole
step's batch, so that what is computed from it is the same everywhere; only the micro-batches are
divided.
"""

import time
import traceback
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from kdrl_train import output
from kdrl_train.config import TrainConfig
from kdrl_train.config.models import DEFAULT_TEACHER, SELF
from kdrl_train.errors import BrokenWeightsError, describe
from kdrl_train.method.evaluation import EVAL_STEP, summarize
from kdrl_train.method.histogram import length_counts
from kdrl_train.method.metrics import reward_metrics
from kdrl_train.model.load import use_device
from kdrl_train.model.policy import Policy
from kdrl_train.output import guarded, guarded_console, shown
from kdrl_train.ranks import connect
from kdrl_train.regroup import first_cause
from kdrl_train.rollouts.teacher_prompts import read_by_teachers
from kdrl_train.runfolder.best import METRIC
from kdrl_train.runfolder.events import recorded
from kdrl_train.runfolder.log import Stages, peak_memory_bytes
from kdrl_train.runfolder.signals import Stopped
from kdrl_train.start.open_run import open_run, take_folder
from kdrl_train.step.collect import collect, draw, sample_and_judge
from kdrl_train.step.run import Run
from kdrl_train.step.samples import SampleRecorder
from kdrl_train.step.trained_model import write_best, write_model
from kdrl_train.step.update import update


def main(
    config: TrainConfig, console: Console | None = None, policy_class: type[Policy] = Policy
) -> Path:
    """Train; returns the run folder, with the final model in model/.

    On SIGTERM, SIGHUP or Ctrl-C the step at hand is dropped and those done are saved. Where nobody
    can read what is printed any more, the run goes on without it.

    Args:
        config: the whole run.
        console: where progress goes; None: standard output.
        policy_class: Policy, or a subclass with another loss.
    Raises: ValueError for a configuration, data or models that do not fit together, a used folder
        without resume, resume without a run, or with one of another configuration;
        FloatingPointError for a loss or gradient that is not finite, EngineError for an engine
        that samples from another policy, both before the optimiser step; RankError where another
        rank failed.
    """
    screen = shown("train") if console is None else guarded()
    device = use_device(config.model)
    tensor = config.model.tensor_parallel
    ranks = connect(device, config.ranks, config.out, tensor)
    with screen, ranks as world, ExitStack() as stack:
        console = guarded_console(console)
        config, lock = take_folder(config, world, stack)
        if world.main:
            console.print(Text(title(config)), soft_wrap=True)
        with first_cause(world.meeting):
            run, first = open_run(config, world, stack, console, policy_class, lock)
        if world.watch is not None:
            world.watch.begin_steps(run.log.event)
        with recorded(run.log, config, world.size):
            if steps(run, first):
                output.heading("all steps done")
                output.begin("saving the model")
                with first_cause(world.meeting):
                    where = write_model(run)
                    if run.best is not None:
                        where += f"; {write_best(run)}"
                run.log.event("finished", f"all steps are done: {where}")
    return config.out


def title(config: TrainConfig) -> str:
    """Say in a line which run this is; the first on the screen."""
    places = config.model.teacher_places if config.method.kd is not None else {}
    if config.model.teacher_is_self and places:  # after the same prompts it is the KL to the start
        template = config.data.teacher_template
        read = "the policy's prompts" if template is None else "data.teacher_template"
        places |= {DEFAULT_TEACHER: f"{SELF} ({config.model.self_teacher}, reads {read})"}
    teachers = [
        place if name == DEFAULT_TEACHER else f"{name}: {place}" for name, place in places.items()
    ]
    return (
        f"{config.out}: {'going on with' if config.resume else 'training'} {config.model.policy}"
        f"{''.join(f', teacher {teacher}' for teacher in teachers)}, on {config.data.path}"
    )


def steps(run: Run, first: int) -> bool:
    """Run steps first to config.steps. However the loop ends, the steps that are done are saved.
    Returns False where a signal stopped the run before the last one."""
    try:
        return loop(run, first)
    except Exception as error:
        first_error = rescue(run, error)
        if first_error is error:
            raise
        raise first_error from error


def loop(run: Run, first: int) -> bool:
    """Run the steps, until the last one or a signal; returns what `steps` does."""
    try:
        finish_postponed(run, first - 1)
        for step in range(first, run.config.steps):
            one_step(run, step)
        run.saver.check(wait=True)
    except Stopped:
        save_rest(run)
        return stopped(run, run.position.done)
    return True


def one_step(run: Run, step: int) -> None:
    """Run one step, and save it if it is its turn."""
    config, stages, done = run.config, Stages(shown=True), step + 1
    output.heading(f"step {done}/{config.steps}")
    record = learn(run, step, stages)
    finish(run, step, record, stages)
    run.saver.check()
    if config.is_saved(done) or (run.best is not None and run.best.is_after(done)):
        save(run, done)


def rescue(run: Run, error: Exception) -> Exception:
    """Save the steps that are done before an error ends the run. All ranks come here, each with the
    error that it met.

    Returns: the error that came first, with notes of what became of the steps, and of an error met
        here.
    """
    position, first = run.position, error
    # a RankError repeats the type of the error on another rank
    broken = BrokenWeightsError.__name__ in f"{type(error).__name__}: {error}"
    cause: BaseException | None = error
    run.optimizer.zero_grad(set_to_none=True)
    while cause is not None:  # out of memory: what the step held is in the frames of its error
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__
    if run.policy.device.type == "cuda":
        torch.cuda.empty_cache()
    done, torn, all_here = position.done, position.begun, True
    try:
        if run.world.meeting is not None:
            first, all_here = run.world.meeting.hold(error)
            run.saver.drop()
        if all_here:
            places = run.world.share(lambda: (position.done, position.begun))
            done = min(places)[0]
            torn = torn or broken or len(set(places)) > 1
            if not torn:
                save_rest(run)
    except Exception as second:  # of any type: a checkpoint has many ways to fail
        if str(second) != str(first):
            first.add_note(f"then saving failed with {describe(second)}")
    saved, rest = run.saver.saved, "no step is saved: --resume starts again at step 1"
    if saved:
        rest = f"steps 1 to {saved} are saved: --resume continues there"
    if not all_here and saved < done:
        rest = f"steps {saved + 1} to {done} cannot be saved without that rank; {rest}"
    elif torn and not broken:
        rest = (
            f"an optimiser step of step {done + 1} had begun: the weights belong to no "
            f"whole step and are not saved; {rest}"
        )
    elif torn:
        rest = f"the weights after step {done} are not saved; {rest}"
    first.add_note(rest)
    return first


def save_rest(run: Run) -> None:
    """Save the steps that are done, unless they are saved, and a record that is not logged yet."""
    position = run.position
    if position.record is not None:
        run.world.on_main(partial(run.log.postpone, position.record))
    with suppress(Exception):  # a checkpoint that a thread could not write: the next holds more
        run.saver.check(wait=True)
    if run.world.any(run.saver.saved < position.done):
        save(run, position.done, wait=True)


def stopped(run: Run, done: int) -> bool:
    """Say which signal stopped the run; returns False."""
    names = filter(None, run.world.share(lambda: run.interrupt.signal))  # of any rank
    name = next((f" ({name})" for name in names), "")
    run.log.event("stopped", f"stopped by a signal{name} after {done} steps: --resume continues")
    return False


def learn(run: Run, step: int, stages: Stages) -> dict[str, Any]:
    """Run one step; the optimiser step comes last. Returns its metrics.

    Raises: MidStepError for a later update than the first; any other error before or after it.
    """
    config = run.config
    if run.policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.policy.device)
    batch = collect(run, step, stages)
    if run.prefetch is not None and step + 1 < config.steps:
        run.prefetch.start(step + 1, run.engine.version, partial(draw, run, step + 1))
    recorder = SampleRecorder(len(batch.examples), config.samples_per_step)
    rollouts, verdicts = batch.rollouts, batch.verdicts
    record = {
        "step": step,
        **reward_metrics(batch.rewards, batch.right, verdicts.parts),
        "tokens": int(rollouts.lengths.sum()),
        "response_length": rollouts.lengths.double().mean().item(),
        "verifier_restarts": verdicts.restarts,
        "truncated": rollouts.truncated.double().mean().item(),
        **{f"verifier_{name}": count for name, count in verdicts.counts.items()},
        "response_length_counts": length_counts(rollouts.lengths, config.sampling.max_new_tokens),
        **update(run, batch, step, stages, recorder),
    }
    run.position.finish(record | stages.metrics(tokens=record["tokens"]))
    written = read_by_teachers(config)
    run.log.samples(step, recorder.records(step, batch, run.world, run.tokenizer, written))
    return record


def finish(run: Run, step: int, record: dict[str, Any], stages: Stages) -> None:
    """Push the new weights to the engine, evaluate at intervals, log."""
    with stages("sync"):
        run.engine.load(run.policy, step + 1)
    if is_evaluated(run, step):
        run.stop_if_signalled()  # also so that no rank evaluates while another has failed
        with stages("eval"):
            output.heading(f"evaluation after step {step + 1}")
            record |= evaluation(run)
    log_record(run, record | stages.metrics(tokens=record["tokens"]))


def is_evaluated(run: Run, step: int) -> bool:
    """Whether an evaluation follows the step."""
    done, every = step + 1, run.config.eval.every
    return bool(run.held_out) and (done % every == 0 or done == run.config.steps)


def finish_postponed(run: Run, step: int) -> None:
    """Finish the last step of the interrupted run: its evaluation, if it has one, and its record.

    Raises: as finish.
    """
    record = run.world.on_main(lambda: run.log.postponed(step))
    if record is not None:
        output.heading(f"evaluation after step {step + 1}")
        log_record(run, record | (evaluation(run) if is_evaluated(run, step) else {}))
        if run.best is not None and run.best.is_after(step + 1):  # its checkpoint is there
            run.world.on_main(run.best.write)


def log_record(run: Run, record: dict[str, Any]) -> None:
    """Give a step's record to the log, to the schedules and to the search for the best one."""
    record |= {"peak_memory_bytes": peak_memory_bytes(run.policy.device)}
    run.world.on_main(lambda: run.log.step(record))  # no rank goes on where it fails
    run.position.record = None
    run.history.add(record)
    if run.best is not None and run.best.add(record):
        run.log.event("best", f"the best evaluation so far: avg@k {record[METRIC]:.4g}")


def save(run: Run, done: int, wait: bool = False) -> None:
    """Save a checkpoint after `done` steps; `wait` as in Saver.save. The steps are in the log
    already: a run killed in between loses no record, and a resumed one drops those it will write
    again."""
    output.heading(f"step {done}/{run.config.steps}")
    output.begin("saving a checkpoint")
    rollouts = None
    if run.prefetch is not None:
        rollouts = run.prefetch.state(done, run.config.sampling.group_size)
    run.saver.save(done, run.policy, run.optimizer, rollouts, wait, run.teachers.average)


def evaluation(run: Run) -> dict[str, float]:
    """Measure the policy on each set of held-out problems."""
    config, metrics = run.config, dict[str, float]()
    sampling, greedy = config.eval.sampling(config.sampling), config.eval.greedy
    for problems in run.held_out:
        start, stages = time.perf_counter(), Stages(shown=True)
        judged = sample_and_judge(run, problems, sampling, EVAL_STEP, stages, greedy=greedy)
        seconds = time.perf_counter() - start
        size, name = sampling.group_size, problems.section.removeprefix("eval.sets.")
        result = summarize(judged.rollouts, judged.verdicts, size, config.seed, seconds)
        metrics |= result.metrics("eval_" if problems is run.held_out[0] else f"eval/{name}/")
    return metrics
