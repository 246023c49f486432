"""Trains a small policy with KDRL from nothing, in minutes on two CPU cores.

The demo writes a task, then trains a tokenizer, a teacher on worked solutions, and a smaller
student on the same solutions with slips in them. It runs `train` with the `kdrl` preset, and
measures the student before and after on problems that neither model has seen.
"""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdrl_train import train
from kdrl_train.batch import CompletionCoefficients, Example
from kdrl_train.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.errors import written
from kdrl_train.method.config import ScheduleConfig
from kdrl_train.method.metrics import add_sums, token_means
from kdrl_train.method.presets import PRESETS
from kdrl_train.model.load import load_policy, load_teacher, load_tokenizer
from kdrl_train.model.packing import pack
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.output import guarded_console
from kdrl_train.rollouts.problems import encode_prompt, load_examples
from kdrl_train.rollouts.sampler import SampleRequest, generate_rollouts
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.writable import require_writable
from kdrl_train.settings import (
    LearningRate,
    NaturalFloat,
    NaturalInt,
    PositiveInt,
    Probability,
    settings,
)
from kdrl_train.tools import sft
from kdrl_train.tools.evaluate import evaluate
from kdrl_train.tools.toy import ArithmeticConfig, make_arithmetic
from kdrl_train.tools.toy.models import ArchitectureConfig, small_architecture, train_tokenizer

KL_STEP = 2**31 + 1  # seeds the completions that the KL is measured on; evaluation uses 2**31


@settings
class DemoConfig:
    """The whole demo. The defaults take about three and a half minutes on two cores."""

    out: Path | None = None
    """New folder for everything. None: the first of runs/demo, runs/demo-2, ... that is free."""
    seed: NaturalInt = 0
    """Seed of the task, the initial weights and the run."""
    task: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    problems: PositiveInt = 20000
    """Problems to learn from."""
    held_out: PositiveInt = 250
    """Problems to measure on, none of them learnt from."""
    samples: PositiveInt = 4
    """k of avg@k: completions per held-out problem, at temperature 1."""
    teacher: ArchitectureConfig = field(default_factory=lambda: small_architecture(80))
    teacher_steps: PositiveInt = 600
    """Supervised steps of the teacher, on correct solutions."""
    student: ArchitectureConfig = field(default_factory=lambda: small_architecture(64))
    student_steps: PositiveInt = 850
    """Supervised steps of the student, on solutions with slips (wrong calculations)."""
    slips: Probability = 0.3
    """Probability of a slip in each step of these solutions; the student learns to slip as
    often."""
    sft_batch_tokens: PositiveInt = 1792
    """Tokens of a batch, in both supervised runs."""
    sft_learning_rate: LearningRate = 5e-3
    """Peak learning rate of both supervised runs."""
    steps: PositiveInt = 45
    """Optimiser steps of KDRL."""
    prompts_per_step: PositiveInt = 32
    """P: prompts per step of KDRL."""
    group_size: PositiveInt = 8
    """G: completions per prompt."""
    max_new_tokens: PositiveInt = 48
    """Longest completion, in tokens; a worked solution has up to 32."""
    learning_rate: LearningRate = 7e-4
    """Learning rate of KDRL."""
    beta: NaturalFloat = 0.5
    """Weight of the teacher's reverse KL at the first step of KDRL."""
    final_beta: NaturalFloat = 0.05
    """Weight of the teacher's reverse KL that it would have one step after the last. It changes
    linearly in between."""
    threads: PositiveInt = 1
    """CPU threads of PyTorch. For such small models a second thread gains little on an idle
    machine; on a busy one the two wait for each other, and the demo is five times slower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Holds what was measured of one model on the held-out problems, sampled at temperature 1."""

    accuracy: float
    """avg@k: share of right completions."""
    length: float
    """Tokens per completion."""
    truncated: float
    """Share of completions cut at max_new_tokens."""
    kl: float
    """Exact KL(model || teacher), nats per token of the model's completions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Holds what the table shows; result.json has the same."""

    before: Measurement
    after: Measurement
    teacher: Measurement
    seconds: dict[str, float]
    """Wall-clock seconds of each part, and `total`."""
    run: Path
    """Folder of the KDRL run."""


def main(config: DemoConfig, console: Console | None = None) -> DemoResult:
    """Runs the demo and prints its table.

    Args:
        console: where progress and the table go; None: standard output.
    Raises: ValueError if the folder exists.
    """
    console = guarded_console(console)
    out = config.out or free_folder(Path("runs"))
    if out.exists():
        raise ValueError(f"out must be a new folder, got {out}, which exists: choose another --out")
    require_writable(out)
    out.mkdir(parents=True)  # at once: another demo that begins now takes another name
    stopwatch = Stopwatch(console)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with stopwatch("task and tokenizer"):
            write_task(config, out)
        with stopwatch("teacher"):
            sft.main(sft_config(config, out, "teacher"), console)
        with stopwatch("student"):
            sft.main(sft_config(config, out, "student"), console)
        run = train_config(config, out)
        with stopwatch("measure before"):
            before = measure(str(out / "student"), run, config)
            teacher = measure(str(out / "teacher"), run, config)
        with stopwatch("KDRL"):
            train.main(run, console)
        with stopwatch("measure after"):
            after = measure(str(run.out / "model"), run, config)
    finally:
        torch.set_num_threads(threads)
    result = DemoResult(
        before=before,
        after=after,
        teacher=teacher,
        seconds=stopwatch.seconds | {"total": sum(stopwatch.seconds.values())},
        run=run.out,
    )
    text = json.dumps(asdict(result), indent=1, default=str)
    with written(out / "result.json"):
        (out / "result.json").write_text(text + "\n", encoding="utf-8")
    console.print(result_table(result, config))
    return result


class Stopwatch:
    """Announces each part of the demo and measures its wall-clock seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measures a block."""
        self.console.rule(part, align="left")
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start


def free_folder(parent: Path) -> Path:
    """Returns parent/demo, or the first of parent/demo-2, -3, ... that does not exist."""
    names = itertools.chain(["demo"], (f"demo-{i}" for i in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())


def write_task(config: DemoConfig, out: Path) -> None:
    """Writes train.jsonl, sloppy.jsonl (the same problems, solved with slips), held_out.jsonl
    (other problems) and tokenizer/ in `out`."""
    rows = make_arithmetic(config.problems + config.held_out, config.seed, config.task)
    sloppy = make_arithmetic(config.problems, config.seed, config.task, config.slips)
    jsonl.write(out / "train.jsonl", rows[: config.problems])
    jsonl.write(out / "sloppy.jsonl", sloppy)
    jsonl.write(out / "held_out.jsonl", rows[config.problems :])
    texts = (f"{row['question']}\n{row['solution']}" for row in rows[: config.problems])
    train_tokenizer(texts, vocab_size=320, folder=out / "tokenizer")


def data_config(path: Path) -> DataConfig:
    """Configures a file of the task; the newline after the question is part of the prompt."""
    return DataConfig(path=str(path), prompt_template="{prompt}\n")


def sft_config(config: DemoConfig, out: Path, name: str) -> sft.SftConfig:
    """Configures the supervised run of the "teacher" or the "student"."""
    strong = name == "teacher"
    return sft.SftConfig(
        out=out / name,
        seed=config.seed + strong,  # so that the two see other batches
        data=data_config(out / ("train.jsonl" if strong else "sloppy.jsonl")),
        tokenizer=str(out / "tokenizer"),
        architecture=config.teacher if strong else config.student,
        steps=config.teacher_steps if strong else config.student_steps,
        batch_tokens=config.sft_batch_tokens,
        learning_rate=config.sft_learning_rate,
        device="cpu",
    )


def train_config(config: DemoConfig, out: Path) -> TrainConfig:
    """Configures the preset `kdrl` with the exact KL.

    Beta is larger than the paper's and falls, since the run has minutes to learn, not days.
    """
    beta = ScheduleConfig(
        kind="linear", initial=config.beta, final=config.final_beta, steps=config.steps
    )
    return TrainConfig(
        out=out / "run",
        seed=config.seed,
        steps=config.steps,
        save_every=config.steps,
        model=ModelConfig(policy=str(out / "student"), teacher=str(out / "teacher"), device="cpu"),
        data=data_config(out / "train.jsonl"),
        sampling=SamplingConfig(
            prompts_per_step=config.prompts_per_step,
            group_size=config.group_size,
            max_new_tokens=config.max_new_tokens,
            batch_size=1024,
        ),
        reward=RewardConfig(function="math"),
        method=replace(PRESETS["kdrl"], kd="rkl", kd_coef=beta),
        optim=OptimConfig(learning_rate=config.learning_rate, micro_batch_tokens=2048),
    )


def measure(model: str, run: TrainConfig, config: DemoConfig) -> Measurement:
    """Measures the model in a folder on `samples` completions of each held-out problem."""
    run = replace(run, model=replace(run.model, policy=model))
    held_out = data_config(Path(run.data.path).with_name("held_out.jsonl"))
    examples = load_examples(held_out)
    teacher = load_teacher(run)
    assert teacher is not None  # the preset distils
    policy = load_policy(run, teacher.vocab_size)
    tokenizer = load_tokenizer(model)
    with Verifier(run.reward) as verifier:
        result = evaluate(
            policy.model,
            tokenizer,
            examples,
            data=held_out,
            sampling=replace(run.sampling, group_size=config.samples),
            verifier=verifier,
            seed=config.seed,
            vocab_size=policy.sampled_vocab_size,
            allowed_mismatch=run.engine.allowed_mismatch(run.model.dtype),
        )
    return Measurement(
        accuracy=result.avg_at_k,
        length=result.mean_length,
        truncated=result.truncated,
        kl=teacher_kl(policy, teacher, tokenizer, examples, run),
    )


@torch.no_grad()
def teacher_kl(
    policy: Policy, teacher: Teacher, tokenizer: Any, examples: list[Example], run: TrainConfig
) -> float:
    """Measures the mean exact KL(policy || teacher) in nats per token, on one completion of each
    example."""
    request = SampleRequest(
        prompts=[encode_prompt(tokenizer, example, run.data) for example in examples],
        sampling=replace(run.sampling, group_size=1),
        seed=run.seed,
        step=KL_STEP,
    )
    rollouts = generate_rollouts(
        policy.model, tokenizer, request, sampled_vocab_size=policy.sampled_vocab_size
    )
    zeros, ones = torch.zeros(len(examples)), torch.ones(len(examples))
    coefficients = CompletionCoefficients(advantages=zeros, kd_weight=ones, token_weights=ones)
    sums: dict[str, torch.Tensor] = {}
    for batch in pack(rollouts, coefficients, run.optim.micro_batch_tokens):
        sums = add_sums(sums, policy(batch, torch.tensor(1.0), teacher(batch)).sums)
    kl = token_means(sums)["kl_teacher"]
    assert kl is not None  # every completion has a token, and every token a weight
    return kl


def result_table(result: DemoResult, config: DemoConfig) -> Table:
    """Makes a table of the student before and after, and the teacher; time and folder below."""
    total = result.seconds["total"]
    parts = ", ".join(f"{name} {s:.0f} s" for name, s in result.seconds.items() if name != "total")
    gain = 100 * (result.after.accuracy - result.before.accuracy)
    table = Table(
        title=f"KDRL, {config.steps} steps; {config.held_out} held-out problems",
        caption=Text(f"{gain:+.1f} points in {total:.0f} s ({parts})\nrun folder: {result.run}"),
        caption_justify="left",
    )
    table.add_column("")
    kl = "KL to teacher (nats/token)"
    for name in (f"avg@{config.samples}", "tokens per completion", "cut off", kl):
        table.add_column(name, justify="right")
    for name, measurement in (
        ("student before", result.before),
        ("student after", result.after),
        ("teacher", result.teacher),
    ):
        table.add_row(
            name,
            f"{measurement.accuracy:.1%}",
            f"{measurement.length:.1f}",
            f"{measurement.truncated:.1%}",
            f"{measurement.kl:z.4f}",
        )
    return table
