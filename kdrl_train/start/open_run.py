"""Opens a run: models, data, engine, optimizer and log, before its first step."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console

from kdrl_train import output
from kdrl_train.config import TrainConfig
from kdrl_train.config.models import SELF
from kdrl_train.config_file import save_yaml, to_dict
from kdrl_train.errors import RunError
from kdrl_train.method.schedules import History, rebuild_history
from kdrl_train.model import lora
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.model.self_teacher import EmaTeacher, LiveTeacher
from kdrl_train.model.teacher.client import TeacherInfo
from kdrl_train.model.teacher.identity import check_same_teacher, describe, keep_teacher
from kdrl_train.model.teacher.remote import RemoteTeacher
from kdrl_train.model.teachers import Teachers
from kdrl_train.ranks import World
from kdrl_train.rollouts.engines import Engine, open_engine
from kdrl_train.rollouts.engines.vllm_server import VllmServerEngine
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder import checkpoint
from kdrl_train.runfolder.async_saver import Saver
from kdrl_train.runfolder.best import BestSoFar, measures
from kdrl_train.runfolder.durable import point_to
from kdrl_train.runfolder.lock import FILE as LOCK
from kdrl_train.runfolder.lock import WAIT_S, RunLock
from kdrl_train.runfolder.log import RunLog, read_postponed, read_records
from kdrl_train.runfolder.resume import (
    changed_evaluation,
    changed_rate,
    check_data,
    open_folder,
    resumes,
)
from kdrl_train.runfolder.signals import Interrupt
from kdrl_train.runfolder.trackers import Trackers
from kdrl_train.runfolder.writable import require_writable
from kdrl_train.start.base_model import check_base, keep_base
from kdrl_train.start.known_policy import check_policy, keep_policy
from kdrl_train.start.load import Loaded, LoadedTeacher, described, load, require_names
from kdrl_train.start.optimizer import make_optimizer
from kdrl_train.start.preflight import preflight, require
from kdrl_train.start.prompts import PROBE_PROMPTS
from kdrl_train.start.self_teacher import describe_self, first_prompts
from kdrl_train.start.teacher_server import hash_here, with_probe
from kdrl_train.step.prefetch import Prefetch
from kdrl_train.step.run import Position, Run


def open_run(
    config: TrainConfig,
    world: World,
    stack: ExitStack,
    console: Console | None = None,
    policy_class: type[Policy] = Policy,
    lock: RunLock | None = None,
) -> tuple[Run, int]:
    """Load and check everything that a run needs, and restore its newest checkpoint.

    `stack` closes what the run holds open; the others are as in train.main. Returns: the run, and
    the optimiser steps that are done already.
    """
    verifier = stack.enter_context(Verifier(config.reward))
    interrupt = stack.enter_context(Interrupt(world.launched))
    interrupt.starting = True
    trackers = stack.enter_context(Trackers(config.log))
    newest = world.on_main(lambda: open_folder(config))
    world.on_main(trackers.log_in)
    torch.manual_seed(config.seed)
    loaded = stack.enter_context(closing(load(config, world, policy_class)))
    policy = loaded.policy
    warnings = [] if newest is None else check_data(newest, loaded.data, config)
    warnings += require(preflight(config, loaded, verifier, world))
    described_teachers, unsure = world.on_main(lambda: checked_teachers(config, loaded))
    origin = world.on_main(lambda: (check_base(config), check_policy(config, loaded)))
    output.begin(f"starting the engine, {config.engine.kind}")
    engine = stack.enter_context(closing(open_engine(config, policy, loaded.tokenizer, world)))
    optimizer = make_optimizer(config.optim, policy.parameters(), world)
    prefetch = open_prefetch(config, policy, interrupt, stack)
    teachers = teachers_of(config, loaded)
    first, doubts = restore(config, newest, policy, optimizer, prefetch, teachers.average, world)
    engine.load(policy, first)
    history, best = read_history(config, world, first), open_best(config, world, loaded, first)
    world.on_main(lambda: begin_folder(config, trackers, newest, described_teachers, origin, lock))
    log = RunLog(config.out, first, config.steps, console, world.main, trackers, lock)
    attach(engine, log, interrupt)
    doubts = warnings + unsure + doubts + lost_metrics(config, world, first)
    say_start(log, config, loaded, newest, best, doubts)
    saver = Saver(config, world, log.say, loaded.data, first, log.require_ours, best)
    interrupt.starting = False
    return Run(
        config=pack_for(config, world, policy, *loaded.teacher_models.values()),
        world=world,
        tokenizer=loaded.tokenizer,
        policy=policy,
        teachers=replace(teachers, remote=open_remotes(config, loaded, log, stack)),
        engine=engine,
        optimizer=optimizer,
        examples=loaded.examples,
        held_out=loaded.held_out,
        verifier=verifier,
        interrupt=interrupt,
        history=history,
        best=best,
        log=log,
        saver=stack.enter_context(closing(saver)),
        prefetch=prefetch,
        position=Position(first),
    ), first


def open_prefetch(
    config: TrainConfig, policy: Policy, interrupt: Interrupt, stack: ExitStack
) -> Prefetch | None:
    """Open what draws the next step's completions; None: engine.staleness is 0."""
    if not config.engine.staleness:
        return None
    return stack.enter_context(closing(Prefetch(policy.device, interrupt.poll)))


def say_start(
    log: RunLog,
    config: TrainConfig,
    loaded: Loaded,
    newest: checkpoint.Checkpoint | None,
    best: BestSoFar | None,
    doubts: list[str],
) -> None:
    """Log what is doubtful, what has changed, and the first prompts of a new run."""
    if config.model.lora.rank:
        log.say(lora.summary(loaded.policy.model))
    for doubt in doubts:
        log.event("warning", doubt)
    for change in changes(config, newest, best):
        log.event("settings", change)
    for prompt in first_prompts(config, loaded) if newest is None else ():
        log.event("prompt", prompt)


def changes(
    config: TrainConfig, newest: checkpoint.Checkpoint | None, best: BestSoFar | None
) -> list[str]:
    """Say which changes of the settings make numbers before and after the start differ."""
    texts = []
    if newest is not None:
        both = changed_rate(newest, config), changed_evaluation(newest, config)
        texts += [text for text in both if text is not None]
    if best is not None and best.changed:
        texts.append("another evaluation than that of best.json: the search for the best is new")
    return texts


def lost_metrics(config: TrainConfig, world: World, first: int) -> list[str]:
    """Say of a resumed run whether its curves lack the steps before, on rank 0."""
    if first <= 1 or not world.main or read_records(config.out):
        return []
    return [f"{config.out} has no metrics.jsonl: the curves begin at step {first + 1}"]


def open_best(config: TrainConfig, world: World, loaded: Loaded, first: int) -> BestSoFar | None:
    """Go on with the search for the best evaluation; None: eval.keep_best is off."""
    if not config.eval.keep_best:
        return None
    measured = measures(config, loaded.held_out[0].facts.identity)
    return world.on_main(lambda: BestSoFar(config.out, first, measured, config.sampling))


def attach(engine: Engine, log: RunLog, interrupt: Interrupt) -> None:
    """Have an engine on a server report outages and restarts to the log, and stop at a signal."""
    if isinstance(engine, VllmServerEngine):
        engine.poll = interrupt.poll
        engine.server.say = partial(log.event, "engine")


def take_folder(
    config: TrainConfig, world: World, stack: ExitStack
) -> tuple[TrainConfig, RunLock | None]:
    """Lock the run folder until the stack is closed, and see whether there is a run to resume.

    Returns: the configuration with resume True or False; the lock, None on other ranks than rank 0.
    Raises: ValueError for a folder that cannot be written, RunError where another run is at work.
    """
    require_offload_fits(config, world)
    locks: list[RunLock] = []

    def take() -> None:
        require_writable(config.out)
        require_names(config)
        lock = RunLock(config.out, WAIT_S if config.resume else 0.0)
        locks.append(stack.enter_context(lock))

    world.on_main(take)
    resume = world.on_main(lambda: resumes(config))
    return replace(config, resume=resume), locks[0] if locks else None


def begin_folder(
    config: TrainConfig,
    trackers: Trackers,
    newest: checkpoint.Checkpoint | None,
    teachers: Mapping[str, TeacherInfo],
    origin: tuple[dict[str, str | None] | None, dict[str, Any]],
    lock: RunLock | None,
) -> None:
    """Write into the folder, now that every check has passed: open the run's trackers, write
    config.yaml, which makes the folder a used one, and the files of the teachers and the policy.

    teachers: the description of each by its name.
    origin: of check_base and of check_policy.

    Raises: ValueError for a tracker that does not start, RunError where another run has saved a
        checkpoint since `newest` in a folder without locks; what was written is removed again.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    new = not any(path.name != LOCK for path in config.out.iterdir())
    if lock is not None:
        lock.claim()
    now = checkpoint.checkpoints(config.out / "checkpoints")[-1:]
    if now != ([] if newest is None else [newest.folder]):
        raise RunError(
            f"{config.out} must be of one run at a time, got the checkpoint {now} while this one "
            "was starting: start it again"
        )
    try:
        trackers.start(to_dict(config), config.out, 0 if newest is None else newest.step)
    except ValueError:
        trackers.close()  # TensorBoard's thread writes into the folder until then
        for path in config.out.iterdir() if new else ():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    if newest is not None:
        checkpoint.clean(newest.folder.parent)  # what a kill left: a run that is done saves no more
        point_to(newest.folder)
    save_yaml(replace(config, resume=False, allow_changes=()), config.out / "config.yaml")
    for name, teacher in teachers.items():
        keep_teacher(config.out, teacher, name)
    keep_base(config, origin[0])
    keep_policy(config, origin[1])


def require_offload_fits(config: TrainConfig, world: World) -> None:
    """Raise ValueError for offloading without torchrun: FSDP2 does it."""
    for key in ("offload_policy", "offload_teacher"):
        if getattr(config.model, key) and not world.launched:
            raise ValueError(
                f"model.{key} must be false without torchrun, got true: FSDP2 offloads"
            )


def pack_for(
    config: TrainConfig, world: World, *models: Policy | Teacher | LiveTeacher
) -> TrainConfig:
    """Return the configuration with one sequence a pack where a sharded model needs rows of one.

    In one process such a model runs the sequences of a pack one after the other. Ranks gather a
    layer's weights together, so each must run as many rows as the others.
    """
    if not world.launched or all(m.choice.packs and m.choice.longest is None for m in models):
        return config
    return replace(config, optim=replace(config.optim, micro_batch_tokens=1))


def describe_teacher(config: TrainConfig, loaded: Loaded, teacher: LoadedTeacher) -> TeacherInfo:
    """Describe a teacher, behind a URL or in this process, whose files are hashed."""
    if teacher.place == SELF:
        return describe_self(config, teacher)
    if teacher.model is None:
        assert teacher.server is not None
        probed = loaded.examples[:PROBE_PROMPTS]
        info = with_probe(config, teacher.server, teacher.head, loaded.tokenizer, probed)
        return replace(info, vocab_size=teacher.vocab_size, files=hash_here(info.root))
    output.begin(f"hashing the teacher, {described(teacher.place)}", at_once=True)
    return describe(teacher.place, teacher.model, teacher.tokenizer)


def checked_teachers(
    config: TrainConfig, loaded: Loaded
) -> tuple[dict[str, TeacherInfo], list[str]]:
    """Describe the teachers, and compare them with those of the run so far.

    Returns: name -> description; and what to warn of.
    """
    teachers = {one.name: describe_teacher(config, loaded, one) for one in loaded.teachers}
    moves = {SELF} if config.model.self_teacher != "frozen" else set()
    places = config.model.teacher_places
    doubts = []
    for name, teacher in teachers.items() if config.resume else ():
        if places[name] not in moves:
            doubts += check_same_teacher(config.out, teacher, name)
    return teachers, doubts


def teachers_of(config: TrainConfig, loaded: Loaded) -> Teachers:
    """Number the teachers of a run; those behind URLs are opened by open_remotes."""
    names = tuple(teacher.name for teacher in loaded.teachers)
    several = bool(config.model.teachers and loaded.teachers)
    extrapolation = config.method.extrapolation if loaded.teachers else 1.0
    return Teachers(names, loaded.teacher_models, several=several, extrapolation=extrapolation)


def open_remotes(
    config: TrainConfig, loaded: Loaded, log: RunLog, stack: ExitStack
) -> dict[int, RemoteTeacher]:
    """Open the teachers behind a URL, by number; they report outages to the log."""
    say, columns = partial(log.event, "teacher"), loaded.policy.sampled_vocab_size
    return {
        number: stack.enter_context(
            RemoteTeacher(teacher.server, config, columns, say, teacher.head)
        )
        for number, teacher in enumerate(loaded.teachers)
        if teacher.server is not None
    }


def read_history(config: TrainConfig, world: World, first: int) -> History:
    """Rebuild what schedules read of the steps before `first` from metrics.jsonl.

    The record of the last one may be postponed: its evaluation is still to come.
    """
    records = world.on_main(lambda: read_records(config.out))
    logged = {record["step"] for record in records}
    postponed = world.on_main(lambda: read_postponed(config.out, first - 1) is not None)
    if postponed and first - 1 not in logged:
        first -= 1
    return rebuild_history(config.method.schedules, records, first, config.eval.every)


def restore(
    config: TrainConfig,
    newest: checkpoint.Checkpoint | None,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    prefetch: Prefetch | None,
    average: EmaTeacher | None,
    world: World,
) -> tuple[int, list[str]]:
    """Load what a run starts from: a checkpoint, or model.weights.

    average: the teacher whose weights the checkpoint holds; at step 0 `load` has given it its own.

    Returns: the steps done, and what to warn of.
    """
    hashes, weights = config.checkpoint_hashes, config.model.weights
    if newest is None:
        if weights is None:
            return 0, []
        return 0, checkpoint.load_weights(weights, policy, world, hashes, config=config.model)
    first = checkpoint.load(
        newest, model=policy, optimizer=optimizer, teacher=average, world=world, hashes=hashes
    )
    if prefetch is not None:
        prefetch.restore(newest.folder)
    return first, checkpoint.unchecked(newest) if hashes else []
