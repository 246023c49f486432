"""Makes the study's problems, tokenizers and models once, and keeps them in its folder."""

import random
from collections.abc import Mapping
from pathlib import Path

from bench.study.arms import ARMS
from bench.study.config import StudyConfig
from kdrl_train.runfolder import jsonl
from kdrl_train.tools.demo import data_config
from kdrl_train.tools.sft import SftConfig
from kdrl_train.tools.toy import make_splits
from kdrl_train.tools.toy.models import train_tokenizer

TASK_SEED = 0
"""Seed of problems and models; runs have seeds of their own."""
VOCABULARY = 320
MODELS = ("student", "teacher_weak", "teacher_middle", "teacher_strong")
DOMAINS = ("product", "sum")
"""Kinds of problems: with a product, and without one. The column `domain` names a problem's."""
OUT_OF_DISTRIBUTION = ("longer", "larger")


def folder(config: StudyConfig, task: str) -> Path:
    """Return the folder of a task's problems and models."""
    return config.out / "tasks" / task


def write_task(config: StudyConfig, task: str) -> None:
    """Write the problems, the solutions that each model learns from, and tokenizer/.

    Problems are in one .jsonl file a set. Nothing is written where tokenizer/ exists.
    """
    task_models, out = config.task_models(task), folder(config, task)
    if (out / "tokenizer").exists():
        return
    held_out = max(config.validation_problems, config.test_problems)
    rows = {"train": task_models.problems, "held_out": held_out}
    sets = make_splits(task, task_models.level, TASK_SEED, **rows)
    for name, problems in sets.items():
        jsonl.write(out / f"{name}.jsonl", [row | {"domain": domain(row)} for row in problems])
    learnt_by: dict[str, list[dict[str, str]]] = {}
    for name in MODELS:
        learnt = make_splits(
            task, task_models.level, TASK_SEED, **rows, slips=slips(config, task, name)
        )
        learnt_by[name] = learnt.get("sloppy", learnt["train"])
    good, bad = learnt_by["teacher_strong"], learnt_by["student"]
    for kind in DOMAINS:  # a specialist slips as the strong teacher in its domain
        pairs = zip(good, bad, strict=True)
        learnt_by[f"teacher_{kind}"] = [a if domain(a) == kind else b for a, b in pairs]
    learnt_by["student"] = with_hints(bad, sets["train"], task_models.student_hints)
    for name, problems in learnt_by.items():
        jsonl.write(out / f"solutions_{name}.jsonl", problems)
    texts = (f"{row['question']}\n{row['solution']}" for row in sets["train"])
    train_tokenizer(texts, vocab_size=VOCABULARY, folder=out / "tokenizer")


def domain(row: Mapping[str, str]) -> str:
    """Return the domain of a problem."""
    return "product" if "*" in row["solution"] else "sum"


def with_hints(
    learnt: list[dict[str, str]], right: list[dict[str, str]], share: float
) -> list[dict[str, str]]:
    """Show the answer of a share of the problems behind the question, and solve these rightly."""
    rng = random.Random(TASK_SEED)
    return [
        good | {"question": f"{good['question']} {good['answer']}"} if rng.random() < share else row
        for row, good in zip(learnt, right, strict=True)
    ]


def models(config: StudyConfig, task: str) -> tuple[str, ...]:
    """Name the models that the arms of a task need."""
    three = config.quality_arms and task == config.tasks[0]
    names = MODELS if three else ("student", "teacher_middle")
    more = [name for arm in config.arms_of(task) for name in ARMS[arm].models]
    return tuple(dict.fromkeys([*names, *more]))


def slips(config: StudyConfig, task: str, name: str) -> float:
    """Return the chance of a slip in the solutions that a model learns from."""
    return getattr(config.task_models(task), f"{name.removeprefix('teacher_')}_slips")


def model_config(config: StudyConfig, task: str, name: str) -> SftConfig:
    """Return the settings of a model's supervised training, into the folder of its name."""
    task_models, out, student = config.task_models(task), folder(config, task), name == "student"
    return SftConfig(
        out=out / name,
        seed=TASK_SEED + (not student),  # not the same batches in the same order
        data=data_config(out / f"solutions_{name}.jsonl"),
        tokenizer=str(out / "tokenizer"),
        architecture=config.student if student else config.teacher,
        steps=task_models.student_steps if student else task_models.teacher_steps,
        batch_tokens=task_models.batch_tokens,
        learning_rate=task_models.learning_rate,
        device=config.device,
    )
