"""Opens a run: models, data, engine, optimizer and log, before its first step."""

from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console

from kdrl_train.config import TrainConfig
from kdrl_train.config_file import save_yaml, to_dict
from kdrl_train.method.schedules import rebuild_history
from kdrl_train.model.policy import Policy
from kdrl_train.model.teacher.identity import require_same_teacher
from kdrl_train.model.teacher.remote import RemoteTeacher
from kdrl_train.ranks import World
from kdrl_train.rollouts.engines import open_engine
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder import checkpoint
from kdrl_train.runfolder.async_saver import Saver
from kdrl_train.runfolder.log import RunLog, read_records
from kdrl_train.runfolder.resume import open_folder
from kdrl_train.runfolder.signals import Interrupt
from kdrl_train.runfolder.trackers import Trackers
from kdrl_train.start.load import load
from kdrl_train.start.preflight import GOLD_AT_START, preflight, require
from kdrl_train.step.prefetch import Prefetch
from kdrl_train.step.run import Run


def open_run(
    config: TrainConfig,
    world: World,
    verifier: Verifier,
    interrupt: Interrupt,
    trackers: Trackers,
    stack: ExitStack,
    console: Console | None,
) -> tuple[Run, int]:
    """Models, data and log of a run, and the optimiser steps that are done already."""
    for key in ("offload_policy", "offload_teacher"):
        if getattr(config.model, key) and not world.launched:
            raise ValueError(
                f"model.{key} must be false without torchrun, got true: FSDP2 offloads"
            )
    newest = world.on_main(lambda: open_folder(config))
    torch.manual_seed(config.seed)
    loaded = stack.enter_context(closing(load(config, world)))
    policy, teacher = loaded.policy, loaded.teacher
    warnings = require(preflight(config, loaded, verifier, GOLD_AT_START, world))
    engine = open_engine(config, policy, loaded.tokenizer, world)
    optimizer = make_optimizer(config, policy)
    prefetch = stack.enter_context(closing(Prefetch())) if config.engine.staleness else None
    first = restore(config, newest, policy, optimizer, prefetch)
    engine.load(policy, first)
    if world.main:
        config.out.mkdir(parents=True, exist_ok=True)
        save_yaml(replace(config, resume=False), config.out / "config.yaml")
        trackers.start(to_dict(config), config.out, first)
    log = RunLog(config.out, first, config.steps, console, writes=world.main, trackers=trackers)
    for warning in warnings:
        log.say(warning)
    remote, server = None, loaded.server
    if server is not None:
        world.on_main(lambda: require_same_teacher(config.out, server))
        say = partial(log.event, "teacher")
        remote = RemoteTeacher(server, config, policy.sampled_vocab_size, say)
        stack.enter_context(remote)
    schedules, rows = config.method.schedules, world.on_main(lambda: read_records(config.out))
    logged = first - world.on_main(lambda: log.postponed(first - 1) is not None)
    run = Run(
        config=config,
        world=world,
        tokenizer=loaded.tokenizer,
        policy=policy,
        teacher=teacher,
        remote=remote,
        engine=engine,
        optimizer=optimizer,
        examples=loaded.examples,
        held_out=loaded.held_out,
        verifier=verifier,
        interrupt=interrupt,
        history=rebuild_history(schedules, rows, logged, config.eval.every),
        log=log,
        saver=stack.enter_context(closing(Saver(config, world, log.say))),
        prefetch=prefetch,
    )
    return run, first


def restore(
    config: TrainConfig,
    newest: checkpoint.Checkpoint | None,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    prefetch: Prefetch | None,
) -> int:
    """Load what a run starts from, a checkpoint or model.weights; the steps that are done."""
    if newest is None:
        if config.model.weights is not None:
            checkpoint.load_weights(config.model.weights, policy)
        return 0
    first = checkpoint.load(newest, model=policy, optimizer=optimizer)
    if prefetch is not None:
        prefetch.restore(newest.folder)
    return first


def make_optimizer(config: TrainConfig, policy: Policy) -> torch.optim.Optimizer:
    """AdamW over all parameters of the policy."""
    return torch.optim.AdamW(
        policy.parameters(),
        lr=config.optim.learning_rate,
        betas=config.optim.betas,
        weight_decay=config.optim.weight_decay,
    )
