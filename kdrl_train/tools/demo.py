"""The demo: from nothing to a policy trained with KDRL, in minutes on two CPU cores.

Writes a task; trains a tokenizer, a teacher on worked solutions, and a smaller student on the same
solutions with slips in them; then runs `train` with the `kdrl` preset, and measures the student
before and after on problems that neither has seen.
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

from kdrl_train import train
from kdrl_train.batch import Example
from kdrl_train.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.method.config import ScheduleConfig
from kdrl_train.method.metrics import add_sums, token_means
from kdrl_train.method.presets import PRESETS
from kdrl_train.model.load import load_policy, load_teacher, load_tokenizer
from kdrl_train.model.packing import pack
from kdrl_train.model.policy import Policy, Teacher
from kdrl_train.rollouts.problems import encode_prompt, load_examples
from kdrl_train.rollouts.sampler import SampleRequest, generate_rollouts
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder import jsonl
from kdrl_train.tools import sft
from kdrl_train.tools.evaluate import evaluate
from kdrl_train.tools.toy import ArithmeticConfig, make_arithmetic
from kdrl_train.tools.toy.models import ArchitectureConfig, train_tokenizer

KL_STEP = 2**31 + 1  # seeds of the completions that the KL is measured on; evaluation has 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """The whole demo. The defaults take about three and a half minutes on two cores."""

    out: Path | None = None
    """New folder for everything; None: the first free one of runs/demo, runs/demo-2, ..."""
    seed: int = 0
    """Of the task, the initial weights and the run."""
    task: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    problems: int = 20000
    """Problems to learn from."""
    held_out: int = 250
    """Other problems, to measure on."""
    samples: int = 4
    """k of avg@k: completions per held-out problem, at temperature 1."""
    teacher: ArchitectureConfig = field(
        default_factory=lambda: ArchitectureConfig(
            family="qwen3",
            hidden=80,
            layers=2,
            intermediate=224,
            max_positions=128,
            rope_theta=100.0,
        )
    )
    teacher_steps: int = 600
    """Supervised steps of the teacher, on solutions that are right."""
    student: ArchitectureConfig = field(
        default_factory=lambda: ArchitectureConfig(
            family="qwen3",
            hidden=64,
            layers=2,
            intermediate=192,
            max_positions=128,
            rope_theta=100.0,
        )
    )
    student_steps: int = 850
    """Supervised steps of the student, on solutions with slips."""
    slips: float = 0.3
    """Chance of a slip in each step of those solutions; the student samples slips as often."""
    sft_batch_tokens: int = 1792
    """Tokens of a batch of both supervised runs."""
    sft_learning_rate: float = 5e-3
    """Peak learning rate of both supervised runs."""
    steps: int = 45
    """Optimiser steps of KDRL."""
    prompts_per_step: int = 32
    """P: prompts per step of KDRL."""
    group_size: int = 8
    """G: completions per prompt."""
    max_new_tokens: int = 48
    """Longest completion, in tokens; a worked solution has up to 32."""
    learning_rate: float = 7e-4
    """Learning rate of KDRL."""
    beta: float = 0.5
    """Weight of the teacher's reverse KL at the first step of KDRL."""
    final_beta: float = 0.05
    """The same at the last step; linear in between."""
    threads: int = 1
    """CPU threads of PyTorch. At this size a second one gains little on an idle machine, and on a
    busy one the two wait for each other: five times slower."""

    def __post_init__(self) -> None:
        for name in ("problems", "held_out", "samples", "steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One model on the held-out problems, sampled at temperature 1."""

    accuracy: float
    """avg@k: share of right completions."""
    length: float
    """Tokens per completion."""
    truncated: float
    """Share of completions cut at max_new_tokens."""
    kl: float
    """Exact KL(model || teacher), nats per token of the model's own completions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What the table shows; also in result.json."""

    before: Measurement
    after: Measurement
    teacher: Measurement
    seconds: dict[str, float]
    """Wall-clock seconds of each part, and `total`."""
    run: Path
    """Folder of the KDRL run."""


def main(config: DemoConfig, console: Console | None = None) -> DemoResult:
    """Run the demo and print its table.

    Args:
        console: where progress and the table go; None: standard output.
    Raises: ValueError for a folder that is there already.
    """
    console = console or Console(highlight=False)
    out = config.out or free_folder(Path("runs"))
    if out.exists():
        raise ValueError(f"out must be a new folder, got {out}, which exists: choose another --out")
    clock = Clock(console)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with clock("task and tokenizer"):
            write_task(config, out)
        with clock("teacher"):
            sft.main(sft_config(config, out, "teacher"), console)
        with clock("student"):
            sft.main(sft_config(config, out, "student"), console)
        run = train_config(config, out)
        with clock("measure before"):
            before = measure(str(out / "student"), run, config)
            teacher = measure(str(out / "teacher"), run, config)
        with clock("KDRL"):
            train.main(run, console)
        with clock("measure after"):
            after = measure(str(run.out / "model"), run, config)
    finally:
        torch.set_num_threads(threads)
    result = DemoResult(
        before=before,
        after=after,
        teacher=teacher,
        seconds=clock.seconds | {"total": sum(clock.seconds.values())},
        run=run.out,
    )
    text = json.dumps(asdict(result), indent=1, default=str)
    (out / "result.json").write_text(text + "\n", encoding="utf-8")
    console.print(result_table(result, config))
    return result


class Clock:
    """Announces each part of the demo and takes its wall-clock seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a block."""
        self.console.rule(part, align="left")
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start


def free_folder(parent: Path) -> Path:
    """parent/demo, or parent/demo-2, -3, ... if that is taken."""
    names = itertools.chain(["demo"], (f"demo-{i}" for i in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())


def write_task(config: DemoConfig, out: Path) -> None:
    """train.jsonl, sloppy.jsonl (the same problems, solved with slips), held_out.jsonl (others)
    and tokenizer/ in `out`."""
    rows = make_arithmetic(config.problems + config.held_out, config.seed, config.task)
    sloppy = make_arithmetic(config.problems, config.seed, config.task, config.slips)
    jsonl.write(out / "train.jsonl", rows[: config.problems])
    jsonl.write(out / "sloppy.jsonl", sloppy)
    jsonl.write(out / "held_out.jsonl", rows[config.problems :])
    texts = (f"{row['question']}\n{row['solution']}" for row in rows[: config.problems])
    train_tokenizer(texts, vocab_size=320, folder=out / "tokenizer")


def data_config(path: Path) -> DataConfig:
    """A file of the task: the newline after the question is part of the prompt."""
    return DataConfig(path=str(path), prompt_template="{prompt}\n")


def sft_config(config: DemoConfig, out: Path, name: str) -> sft.SftConfig:
    """Supervised run of the "teacher" or the "student", into the folder of that name."""
    strong = name == "teacher"
    return sft.SftConfig(
        out=out / name,
        seed=config.seed + strong,  # not the same batches in the same order
        data=data_config(out / ("train.jsonl" if strong else "sloppy.jsonl")),
        tokenizer=str(out / "tokenizer"),
        architecture=config.teacher if strong else config.student,
        steps=config.teacher_steps if strong else config.student_steps,
        batch_tokens=config.sft_batch_tokens,
        learning_rate=config.sft_learning_rate,
        device="cpu",
    )


def train_config(config: DemoConfig, out: Path) -> TrainConfig:
    """The preset `kdrl` with the exact KL. Beta is larger than the paper's and falls: minutes, not
    days, are there to learn in."""
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
    """Sample `samples` completions of each held-out problem from the model in a folder."""
    run = replace(run, model=replace(run.model, policy=model))
    held_out = data_config(Path(run.data.path).with_name("held_out.jsonl"))
    examples = load_examples(held_out)
    teacher = load_teacher(run)
    policy = load_policy(run, teacher)
    assert teacher is not None  # the preset distils
    tokenizer = load_tokenizer(model)
    with Verifier(run.reward) as verifier:
        result = evaluate(
            policy.model,
            tokenizer,
            examples,
            data=held_out,
            sampling=run.sampling,
            verifier=verifier,
            samples=config.samples,
            seed=config.seed,
            vocab_size=policy.sampled_vocab_size,
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
    """Mean exact KL(policy || teacher) in nats per token, on one completion of each example."""
    request = SampleRequest(
        prompts=[encode_prompt(tokenizer, example, run.data) for example in examples],
        sampling=replace(run.sampling, group_size=1),
        seed=run.seed,
        step=KL_STEP,
    )
    rollouts = generate_rollouts(
        policy.model, tokenizer, request, sampled_vocab_size=policy.sampled_vocab_size
    )
    ones = torch.ones(len(examples))
    sums: dict[str, torch.Tensor] = {}
    for batch in pack(
        rollouts,
        advantages_R=torch.zeros(len(examples)),
        weights_R=ones,
        kd_weight_R=ones,
        micro_batch_tokens=run.optim.micro_batch_tokens,
    ):
        sums = add_sums(sums, policy(batch, torch.tensor(1.0), teacher(batch)).sums)
    kl = token_means(sums)["kl_teacher"]
    assert kl is not None  # every completion has a token, and every token a weight
    return kl


def result_table(result: DemoResult, config: DemoConfig) -> Table:
    """Student before and after, and the teacher; the time and the folder below."""
    total = result.seconds["total"]
    parts = ", ".join(f"{name} {s:.0f} s" for name, s in result.seconds.items() if name != "total")
    gain = 100 * (result.after.accuracy - result.before.accuracy)
    table = Table(
        title=f"KDRL, {config.steps} steps; {config.held_out} held-out problems",
        caption=f"{gain:+.1f} points in {total:.0f} s ({parts})\nrun folder: {result.run}",
        caption_justify="left",
    )
    table.add_column("")
    for name in (f"avg@{config.samples}", "tokens", "cut off", "KL to teacher (nats/token)"):
        table.add_column(name, justify="right")
    for name, row in (
        ("student before", result.before),
        ("student after", result.after),
        ("teacher", result.teacher),
    ):
        table.add_row(
            name,
            f"{row.accuracy:.1%}",
            f"{row.length:.1f}",
            f"{row.truncated:.1%}",
            f"{row.kl:z.4f}",
        )
    return table
