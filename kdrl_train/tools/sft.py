"""Trains a model on prompts and worked solutions, from random weights or from a saved model.

An example is prompt ids + solution ids + EOS. Batches are padded on the right: with causal
attention no token sees a pad that follows it, so no attention mask is needed.
kdrl_kernels.linear_logprobs computes the loss, only on the tokens that carry it.
"""

import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from kdrl_train import output
from kdrl_train.batch import Example
from kdrl_train.config import DataConfig, TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.model import rotary
from kdrl_train.model.load import load_tokenizer, read_model, torch_device
from kdrl_train.model.window import window
from kdrl_train.rollouts.columns import text_of
from kdrl_train.rollouts.problems import encode_prompt, example_of
from kdrl_train.rollouts.records import SUFFIXES, data_records
from kdrl_train.rollouts.rendering import TooLongError
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.export import export
from kdrl_train.runfolder.writable import remove, require_writable
from kdrl_train.settings import (
    LearningRate,
    NaturalFloat,
    NaturalInt,
    PositiveFloat,
    PositiveInt,
    PositiveOrInf,
    Switch,
    settings,
)
from kdrl_train.start.prompts import typed_escapes
from kdrl_train.start.taught import SFT_FILE
from kdrl_train.start.unread import changed, idle, sentences
from kdrl_train.tools.padded_loss import require_same_loss, sft_loss
from kdrl_train.tools.sft_batches import (
    SolvedExample,
    batches,
    collate,
    length_groups,
)
from kdrl_train.tools.toy.models import ArchitectureConfig, make_model, train_tokenizer

FINAL_LR_SHARE = 0.05  # learning rate at the end of the cosine, divided by the peak
LOG_EVERY_S = 10.0


@settings
class SftConfig:
    """One supervised run; saved as sft.yaml beside the model."""

    out: Path = Path("runs/sft")
    """New folder. It gets the model and tokenizer as transformers loads them, sft.yaml and
    sft_metrics.jsonl."""
    seed: NaturalInt = 0
    """Seed of the initial weights and of the order of the examples."""
    data: DataConfig = field(default_factory=DataConfig)
    """Solved problems; their prompts are encoded as in `train`."""
    solution_column: str = "solution"
    """Column with the text to learn. All of its tokens are learnt."""
    model: str | None = None
    """Model to continue from: a folder or hub id. Its tokenizer is used. None: a new model."""
    tokenizer: str | None = None
    """Folder or hub id of a tokenizer. None: that of `model`, or one trained on these examples."""
    trust_remote_code: Switch = False
    """Run Python files in the folder of `model` or `tokenizer` (auto_map in its config.json), with
    the rights of this process. Set it only for authors that you trust."""
    vocab_size: PositiveInt = 2048
    """Largest vocabulary of a tokenizer trained here: 256 bytes, 3 special tokens, merges."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    steps: PositiveInt = 1000
    """Largest number of optimiser steps."""
    minutes: PositiveFloat | None = None
    """Stop after so many minutes, if that is earlier. The learning rate then follows the clock."""
    batch_tokens: PositiveInt = 4096
    """Tokens of a batch, without padding. A longer example makes a batch of its own."""
    learning_rate: LearningRate = 2e-3
    """Peak learning rate. It rises linearly, then falls as a cosine to 5% of the peak."""
    warmup_steps: NaturalInt = 50
    """Optimiser steps in which the learning rate rises linearly from 0."""
    weight_decay: NaturalFloat = 0.01
    """Decoupled weight decay of AdamW."""
    max_grad_norm: PositiveOrInf = 1.0
    """Largest norm of the gradient: a larger gradient is scaled down to it. inf: never."""
    learn_prompts: Switch = False
    """Learn the tokens of the prompts too. It helps if the model must learn the language itself."""
    device: str = "auto"
    """Torch device; auto: cuda if there is a GPU, else cpu."""

    def __post_init__(self) -> None:
        if self.model is not None and self.tokenizer is not None:
            raise ValueError(
                f"tokenizer must be None beside a model, which brings its own, got {self.tokenizer}"
            )


def of_run(run: TrainConfig, _folder: Path) -> SftConfig:
    """Takes over a run's problems and how they are written, its first policy and its device."""
    return SftConfig(
        seed=run.seed, data=run.data, model=run.model.policy or None, device=run.model.device
    )


def unread(config: SftConfig) -> dict[str, str]:
    """Returns why nothing reads some settings with another value than their default, by key."""
    rules = []
    if config.model is not None:
        rules.append(("model brings its own", ["architecture", "vocab_size"]))
    if config.tokenizer is not None:
        rules.append(("tokenizer brings its own", ["vocab_size"]))
    if config.model is None and config.tokenizer is None:
        rules.append(("neither model nor tokenizer is named", ["trust_remote_code"]))
    if config.data.path.endswith(SUFFIXES):
        rules.append(("data.path names a file", ["data.split"]))
    return idle(changed(config), rules)


def read_solutions(config: SftConfig) -> list[tuple[Example, str]]:
    """Reads every row of config.data: the problem, and the text in config.solution_column.

    Raises: ValueError as problems.load_examples does, also for the solution column.
    """
    column = config.solution_column
    data = replace(config.data, answer_column=column)
    solutions = []
    for place, record in data_records(data):
        solution = text_of(place, record, "solution_column", column)
        solutions.append((example_of(place, record, data), solution))
    return solutions


def encode_examples(
    tokenizer: Any, solutions: Sequence[tuple[Example, str]], config: SftConfig, longest: int
) -> list[SolvedExample]:
    """Encodes every problem and solution; `train` encodes the prompts in the same way.

    Those with a prompt of more than data.max_prompt_tokens are left out.

    Raises: ValueError that names an example longer than `longest`, the model's positions, where no
        example is left, and for a tokenizer without an end of sequence.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer must have an eos_token, got none: set it in its tokenizer_config.json"
        )
    encoded = []
    for example, solution in solutions:
        try:
            prompt = encode_prompt(tokenizer, example, config.data)
        except TooLongError:
            continue
        ids = tokenizer(solution, add_special_tokens=False)["input_ids"]
        solved = SolvedExample(prompt, [*ids, tokenizer.eos_token_id])
        if len(solved) > longest:
            new = config.model is None
            raise ValueError(
                f"{'architecture.max_positions' if new else 'the window of model'} must be at "
                f"least {len(solved)}, the tokens of {example.id}, got {longest}: "
                f"{'raise it' if new else 'name another model'}, or leave that problem out"
            )
        encoded.append(solved)
    if not encoded:
        raise ValueError(
            "data.max_prompt_tokens must leave at least one example, got "
            f"{config.data.max_prompt_tokens}, and {len(solutions):,} longer prompts: raise it"
        )
    return encoded


def backward(
    model: Any, examples: Sequence[SolvedExample], pad: int, learn_prompts: bool
) -> tuple[float, int]:
    """Adds the gradient of the examples' mean loss to the parameters.

    Returns: the mean loss in nats, and the number of tokens that carry it.
    """
    groups = length_groups(examples, rotary.longest(model.config.get_text_config()))
    padded = [collate(group, pad, learn_prompts) for group in groups]
    tokens = sum(len(batch.targets) for batch in padded)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch in padded:
        loss = sft_loss(model, batch) / tokens
        loss.backward()
        total += loss.detach()
    return total.item(), tokens


def learning_rate_at(config: SftConfig, step: int, progress: float) -> float:
    """Returns the learning rate: linear warm-up, times a cosine from 1 to 0.05 over `progress`.

    progress: from 0 at the start of the run to 1 at its end.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * warm * cosine


def fit(
    model: Any, examples: Sequence[SolvedExample], pad: int, config: SftConfig, console: Console
) -> list[dict[str, float]]:
    """Trains `model` in place.

    Args:
        pad: id of the token that fills a batch; the model never sees or learns it.
        console: gets a line every ten seconds.
    Returns: one dict per step: step, loss (nats per token), learning_rate, grad_norm, tokens (that
        carried loss), seconds (since the start).
    Raises: FloatingPointError before the optimiser step if loss or gradient norm is not finite.
    """
    start = logged = time.monotonic()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    metrics: list[dict[str, float]] = []
    model.train()
    output.begin("learning")
    for step, batch in zip(range(config.steps), _endless(examples, config), strict=False):
        progress = step / config.steps
        if config.minutes is not None:
            progress = max(progress, (time.monotonic() - start) / (60 * config.minutes))
            if progress >= 1:
                break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(config, step, progress)
        output.count("learning", step, config.steps, " steps")
        loss, tokens = backward(model, batch, pad, config.learn_prompts)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise FloatingPointError(
                f"loss and gradient norm must be finite, got {loss} and {norm.item()} at "
                f"step {step}; lower learning_rate = {config.learning_rate}"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        metrics.append(
            {
                "step": step,
                "loss": loss,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "grad_norm": norm.item(),
                "tokens": tokens,
                "seconds": now - start,
            }
        )
        if now - logged > LOG_EVERY_S:
            logged = now
            console.print(f"step {step + 1}/{config.steps}  loss {loss:.3f}")
    return metrics


def _endless(examples: Sequence[SolvedExample], config: SftConfig) -> Iterator[list[SolvedExample]]:
    """Yields the examples of each step, epoch after epoch."""
    lengths = [len(example) for example in examples]
    for epoch in itertools.count():
        for members in batches(lengths, config.batch_tokens, config.seed, epoch):
            yield [examples[i] for i in members]


def main(config: SftConfig, console: Console | None = None) -> Path:
    """Trains a tokenizer (unless one is named) and a model; returns the folder config.out.

    The folder is complete or absent: it is written under another name and then renamed.

    Args:
        console: where progress goes; None: standard output.
    Raises: ValueError if the folder exists or cannot be written, and what encode_examples and fit
        raise.
    """
    if config.out.exists():
        raise ValueError(f"out must be a new folder, got {config.out}, which exists; remove it")
    require_writable(config.out)
    device = torch_device(config.device, "device")
    console = output.guarded_console(console)
    solutions = read_solutions(config)
    source, trusted = config.model or config.tokenizer, config.trust_remote_code
    if source is None:
        texts = (text for example, solution in solutions for text in (example.prompt, solution))
        tokenizer = train_tokenizer(texts, config.vocab_size)
    else:
        tokenizer = load_tokenizer(source, "model" if config.model else "tokenizer", trusted)
    if config.model is None:
        model = make_model(config.architecture, tokenizer, config.seed).to(device)
    else:
        model = read_model(config.model, "model", torch.float32, plain="trained", trusted=trusted)
        require_same_loss(model.to(device))
        if model.origin.parts:
            console.print(Text(f"not read, and not saved: {', '.join(model.origin.parts)}"))
    longest = window(model.config) or sys.maxsize
    examples = encode_examples(tokenizer, solutions, config, longest)
    for doubt in [*sentences(changed(config), unread(config)), *typed_escapes(config.data)]:
        console.print(Text(doubt), soft_wrap=True)
    if len(examples) < len(solutions):
        console.print(
            f"{len(solutions) - len(examples):,} of {len(solutions):,} examples are left out: "
            f"their prompts have more than {config.data.max_prompt_tokens} tokens"
        )
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        Text(
            f"{config.out}: {parameters:,} parameters, vocabulary {len(tokenizer)}, "
            f"{len(examples):,} examples"
        )
    )
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    metrics = fit(model, examples, pad, config, console)
    partial = config.out.with_name(config.out.name + ".partial")
    remove(partial)  # left by a run that was stopped while it wrote
    dtype_of = model.origin.dtype_of if config.model else None
    export(model, tokenizer, partial, dtype_of=dtype_of, remedy="free space or correct --out")
    save_yaml(config, partial / SFT_FILE)
    jsonl.write(partial / "sft_metrics.jsonl", metrics)
    partial.rename(config.out)
    seconds = metrics[-1]["seconds"] if metrics else 0.0
    text = Text(f"saved {config.out}: {len(metrics)} steps, {seconds:.0f} s")
    console.print(text, soft_wrap=True)
    return config.out
