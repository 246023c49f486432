"""Measures a training step of TRL's GRPOTrainer: python -m bench.measures.trl_step --out DIR

A step is what the trainer does with completions that exist: the policy's forward pass over them,
the loss, and backward through everything. Sampling and the optimiser are not in it. The backbone
is tiny and has random weights; the vocabulary is that of Qwen2.5, so the head is nearly all of the
step. Every contestant has the same weights and completions, on-policy, with the loss type dapo.

Memory is how far a step raises the resident set above what was there before it, in a process of
its own each. Time is taken in one process, all contestants once a
round, in an order drawn for it. Losses and gradients are compared with TRL's before.
"""

import argparse
import gc
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import DEVICE, clock, machine_info, one_line, set_up_cpu
from bench.measures.memory import alone, map_large_blocks, peak_bytes, reset_peak
from bench.measures.timing import sample_rounds

NAME = "trl-step"
TRL = "GRPOTrainer"
KL = "KdrlTrainer, exact KL"
LARGEST_DIFFERENCE = 1e-4
"""Of loss and gradients from TRL's, relative to the largest number of each."""
MEMORY_SECONDS = 400.0
"""Seconds after which the process of a step whose memory is measured is stopped."""
SMALL_WORDS = 8
"""Words of the tokenizer, which reads nothing here."""


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The sizes of a step."""

    vocab: int = 151936
    hidden: int = 256
    layers: int = 2
    completions: int = 8
    length: int = 128
    """Tokens of a completion."""
    prompt: int = 16
    """Tokens of a prompt."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A way to do the step."""

    patched: bool = False
    """Whether TRL's own trainer runs under patch_trl()."""
    kdrl: bool = False
    kd: str | None = None
    head_backward: str = "exact"


CONTESTANTS = {
    TRL: Contestant(),
    "GRPOTrainer, patch_trl()": Contestant(patched=True),
    "KdrlTrainer, no teacher": Contestant(kdrl=True),
    "KdrlTrainer, no teacher, sketch": Contestant(kdrl=True, head_backward="sketch"),
    KL: Contestant(kdrl=True, kd="rkl"),
    "KdrlTrainer, exact KL, sketch": Contestant(kdrl=True, kd="rkl", head_backward="sketch"),
}
Step = Callable[..., tuple[Any, float]]
"""Makes a step, on other completions than the usual if they are passed: the trainer, its loss."""
SAME_AS_TRL = ("GRPOTrainer, patch_trl()", "KdrlTrainer, no teacher")


def make_causal_lm(sizes: StepSizes, seed: int) -> Any:
    """Return a Qwen2 with random weights, whose logits have a standard deviation of about 3."""
    import transformers  # noqa: PLC0415 (seconds to import)

    config = transformers.Qwen2Config(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=sizes.prompt + sizes.length,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.lm_head.weight.normal_(std=3 / math.sqrt(sizes.hidden))
    return model


def make_trainer(contestant: Contestant, sizes: StepSizes, folder: str) -> Any:
    """Return a trainer that takes the completions of `batch` as they are."""
    import datasets  # noqa: PLC0415
    import tokenizers  # noqa: PLC0415
    import transformers  # noqa: PLC0415
    import trl  # noqa: PLC0415

    from kdrl_kernels.integrations.trl import KdrlConfig, KdrlTrainer  # noqa: PLC0415

    words = {"<pad>": 0, "<eos>": 1} | {f"w{n}": n + 2 for n in range(SMALL_WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": sizes.completions,
        "num_generations": sizes.completions,
        "max_completion_length": sizes.length,
        "use_cpu": DEVICE == "cpu",
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments: dict[str, Any] = {
        "model": make_causal_lm(sizes, 0),
        "reward_funcs": lambda completions, **_: [0.0] * len(completions),
        "train_dataset": datasets.Dataset.from_list([{"prompt": "w1"}] * sizes.completions),
        "processing_class": transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
        ),
    }
    if contestant.kdrl:
        settings |= {"kd": contestant.kd, "head_backward": contestant.head_backward}
        if contestant.kd is not None:
            arguments["teacher_model"] = make_causal_lm(sizes, 1)
        trainer = KdrlTrainer(args=KdrlConfig(**settings), **arguments)
    else:
        trainer = trl.GRPOTrainer(args=trl.GRPOConfig(**settings), **arguments)
    trainer.model.train()
    trainer._prepare_inputs = lambda inputs: inputs
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def batch(sizes: StepSizes) -> dict[str, Tensor]:
    """Return completions as TRL's GRPOTrainer prepares them, all of full length."""
    rng = torch.Generator().manual_seed(2)
    B, C = sizes.completions, sizes.length

    def ids(length: int) -> Tensor:
        return torch.randint(2, sizes.vocab, (B, length), generator=rng)

    inputs = {
        "prompt_ids": ids(sizes.prompt),
        "prompt_mask": torch.ones(B, sizes.prompt, dtype=torch.int64),
        "completion_ids": ids(C),
        "completion_mask": torch.ones(B, C, dtype=torch.int64),
        "advantages": torch.randn(B, generator=rng),
        "num_items_in_batch": torch.tensor(B * C),
    }
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


@contextmanager
def trainer_of(name: str, sizes: StepSizes) -> Iterator[Step]:
    """Enter a context with a contestant's step."""
    from kdrl_kernels.integrations.trl import patch_trl  # noqa: PLC0415

    contestant, whole = CONTESTANTS[name], batch(sizes)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(contestant, sizes, folder)

        def step(inputs: dict[str, Tensor] = whole) -> tuple[Any, float]:
            trainer.model.zero_grad(set_to_none=True)
            head: AbstractContextManager = patch_trl() if contestant.patched else nullcontext()
            with head:
                loss = trainer.training_step(trainer.model, inputs, None)
            return trainer, loss.item()

        yield step


def measure_memory(name: str, sizes: StepSizes) -> dict[str, int]:
    """Measure {"peak_bytes", "gradient_bytes", "weight_bytes"} of a step in this process."""
    map_large_blocks()
    with trainer_of(name, sizes) as step:
        trainer, _ = step(batch(replace(sizes, length=1)))  # loads what a step needs
        trainer.model.zero_grad(set_to_none=True)
        gc.collect()
        before = reset_peak()
        step()
        peak = peak_bytes() - before
        parameters = list(trainer.model.parameters())
    return {
        "peak_bytes": peak,
        "gradient_bytes": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "weight_bytes": sum(p.nbytes for p in parameters),
    }


def differences(steps: Mapping[str, Step]) -> dict[str, float]:
    """Return how far the gradients of SAME_AS_TRL are from TRL's, the largest of all weights.

    Raises: ValueError for more than LARGEST_DIFFERENCE.
    """
    trainer, loss = steps[TRL]()
    exact = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    largest = {}
    for other in SAME_AS_TRL:
        trainer, other_loss = steps[other]()
        errors = [abs(other_loss - loss)]
        for name, parameter in trainer.model.named_parameters():
            error = (parameter.grad - exact[name]).abs().max() / exact[name].abs().max()
            errors.append(error.item())
        largest[other] = max(errors)
        if not largest[other] <= LARGEST_DIFFERENCE:
            raise ValueError(f"{other} must give TRL's gradients, got a difference of {errors}")
    return largest


def measure_time(sizes: StepSizes, rounds: int, minutes: float) -> dict[str, Any]:
    """Measure {"differences", "ms": {contestant: ms of each round}}."""
    deadline = time.monotonic() + 60 * minutes
    with ExitStack() as stack:
        steps = {name: stack.enter_context(trainer_of(name, sizes)) for name in CONTESTANTS}
        same = differences(steps)

        def timed(name: str, _: int) -> float:
            start = clock()
            steps[name]()
            return 1e3 * (clock() - start)

        measures = {name: partial(timed, name) for name in steps}
        samples = sample_rounds(measures, rounds, deadline)
    statuses = {name: one.status for name, one in samples.items() if one.status != "ok"}
    ms = {name: one.values for name, one in samples.items()}
    return {"differences": same, "ms": ms, "statuses": statuses}


def table(record: Mapping[str, Any]) -> str:
    """Write what was measured as Markdown, under machines and commands."""
    sizes = record["sizes"]
    tokens = sizes["completions"] * sizes["length"]
    lines = [
        f"{tokens:,} completion tokens, V = {sizes['vocab']:,}, H = {sizes['hidden']:,}, "
        f"{sizes['layers']} layers, float32"
    ]
    for stage in ("memory", "time"):
        if stage in record:
            lines += ["", f"{stage}: {one_line(record[stage]['machine'])}"]
            lines.append(f"`{record[stage]['command']}`")
    columns = ["step", "peak MB", "of it gradients MB", "beyond them MB", "ms (quartiles)", "/ TRL"]
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    memory = record.get("memory", {}).get("contestants", {})
    ms = record.get("time", {}).get("ms", {})
    for name in CONTESTANTS:
        cells = [name, "", "", "", "", ""]
        if name in memory:
            peak, gradients = (memory[name][f"{kind}_bytes"] / 1e6 for kind in ("peak", "gradient"))
            cells[1:4] = [f"{peak:,.0f}", f"{gradients:,.0f}", f"{peak - gradients:,.0f}"]
        if ms.get(name):
            cells[4] = _quartiles(ms[name], "{:,.0f}")
            cells[5] = _quartiles(
                [one / of_trl for one, of_trl in zip(ms[name], ms[TRL], strict=True)], "{:.2f}"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _quartiles(values: list[float], form: str) -> str:
    """Write median and quartiles."""
    if len(values) == 1:
        return form.format(values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{form.format(median)} ({form.format(low)}-{form.format(high)})"


def main(argv: list[str]) -> None:
    """Measure the stages, add them to the record of the folder, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.measures.trl_step", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--stages", nargs="+", choices=("memory", "time"), default=["memory", "time"]
    )
    for name, value in asdict(StepSizes()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=3.5, help="for the time, set-up included")
    args = parser.parse_args(argv)
    set_up_cpu()
    typed = [word for word in argv if word not in ("--out", str(args.out))]
    command = shlex.join(["python", "-m", "bench.measures.trl_step", "--out", "DIR", *typed])
    sizes = StepSizes(**{name: getattr(args, name) for name in asdict(StepSizes())})
    path = args.out / f"{NAME}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if record.get("sizes") != asdict(sizes):
        record = {"sizes": asdict(sizes)}
    about = {"machine": machine_info(), "command": command}
    if "memory" in args.stages:
        rows = {
            name: alone(measure_memory, name, sizes, seconds=MEMORY_SECONDS) for name in CONTESTANTS
        }
        record["memory"] = about | {"contestants": rows}
    if "time" in args.stages:
        record["time"] = about | measure_time(sizes, args.rounds, args.minutes)
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    text = table(record)
    (args.out / f"{NAME}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
