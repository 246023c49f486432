"""Makes the study's problems, tokenizers and models once, and keeps them in its folder."""

from pathlib import Path

from bench.study.config import StudyConfig
from kdrl_train.config import DataConfig
from kdrl_train.runfolder import jsonl
from kdrl_train.tools.sft import SftConfig
from kdrl_train.tools.toy import make_splits
from kdrl_train.tools.toy.models import train_tokenizer

TASK_SEED = 0
"""Seed of problems and models; runs have seeds of their own."""
VOCABULARY = 320
MODELS = ("student", "teacher_weak", "teacher_middle", "teacher_strong")
OUT_OF_DISTRIBUTION = ("longer", "larger")


def folder(config: StudyConfig, task: str) -> Path:
    """Return the folder of a task's problems and models."""
    return config.out / "tasks" / task


def data_config(path: Path) -> DataConfig:
    """Describe a file of problems: the newline after a question is part of the prompt."""
    return DataConfig(path=str(path), prompt_template="{prompt}\n")


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
        jsonl.write(out / f"{name}.jsonl", problems)
    for name in MODELS:
        learnt = make_splits(
            task, task_models.level, TASK_SEED, **rows, slips=slips(config, task, name)
        )
        jsonl.write(out / f"solutions_{name}.jsonl", learnt.get("sloppy", learnt["train"]))
    texts = (f"{row['question']}\n{row['solution']}" for row in sets["train"])
    train_tokenizer(texts, vocab_size=VOCABULARY, folder=out / "tokenizer")


def models(config: StudyConfig, task: str) -> tuple[str, ...]:
    """Name the models that the arms of a task need."""
    three = config.quality_arms and task == config.tasks[0]
    return MODELS if three else ("student", "teacher_middle")


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
