"""Times a vocabulary over two processes: python -m bench.measures.vocab_ranks --out DIR

Two processes with one thread each hold half of the head's rows (`vocab_group`, over gloo). In each
round they run one call together, and the first of them alone the call with all rows, in an order
drawn for the round. Each of the two has half of the FLOP, so time per FLOP is
2 · together / alone: 1 would cost nothing. Losses and gradients of both ways are compared first.
"""

import argparse
import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from bench.inputs import Inputs, make_inputs
from bench.machine import clock, machine_info, one_line
from bench.measures.timing import clear_gradients
from bench.ops import KEY_OPS, OPS_BY_NAME, Op
from bench.providers.home import ours
from bench.results_file import OUT_OF_TIME
from bench.shapes import SHAPES, default_shape

RANKS = 2
NAME = "vocab-ranks"
COLUMNS = ("operation", "alone ms", "together ms", "time per FLOP (quartiles)", "dX", "dW")
LARGEST_ERROR = 1e-5
"""Of a gradient, relative to its largest number: beyond it something else was computed."""


def half(inputs: Inputs, rank: int) -> Inputs:
    """Return the inputs with a rank's part of the rows of both heads.

    Raises: ValueError for heads whose rows cannot be halved alike.
    """
    shape = inputs.shape
    if shape.V_t != shape.V or shape.V % RANKS:
        raise ValueError(f"V and V_t must be equal and even, got {shape.V} and {shape.V_t}")
    rows = slice(rank * shape.V // RANKS, (rank + 1) * shape.V // RANKS)
    return replace(
        inputs,
        shape=replace(shape, V=shape.V // RANKS, V_t=shape.V // RANKS),
        hidden=inputs.hidden.detach().clone().requires_grad_(),
        weight=inputs.weight.detach()[rows].clone().requires_grad_(),
        teacher_weight=inputs.teacher_weight[rows].clone(),
    )


def call(inputs: Inputs, op: Op, **options: Any) -> Tensor:
    """Run one call, forward and backward; the gradients stay in inputs. Returns the loss."""
    clear_gradients(inputs, op)
    loss = ours(inputs, op, **options)["loss"]
    loss.backward()
    return loss.detach()


def errors(part: Inputs, whole: Inputs, rank: int) -> dict[str, float]:
    """Return the largest difference of a rank's gradients, relative to the largest number."""
    rows = slice(rank * part.shape.V, (rank + 1) * part.shape.V)
    pairs = {
        "dhidden": (part.hidden.grad, whole.hidden.grad),
        "dweight": (
            part.weight.grad,
            None if whole.weight.grad is None else whole.weight.grad[rows],
        ),
    }
    largest = {}
    for name, (ours_of_rank, of_whole) in pairs.items():
        assert ours_of_rank is not None
        assert of_whole is not None
        size = of_whole.abs().max()
        largest[name] = ((ours_of_rank - of_whole).abs().max() / size).item()
    return largest


def timed(run: Callable[[], object], rank: int, alone: bool) -> float:
    """Time a call in ms, from when both ranks are ready until the last of those that run ends."""
    dist.barrier()
    start = clock()
    if rank == 0 or not alone:
        run()
    if not alone:
        dist.barrier()
    return 1e3 * (clock() - start)


def rounds_of(op: Op, shape: str, rank: int, rounds: int, deadline: float) -> dict[str, Any]:
    """Compare and time one operation; what rank 0 returns is a row of the table."""
    whole = make_inputs(SHAPES[shape])
    part = half(whole, rank)
    group = dist.group.WORLD
    losses = [call(whole, op), call(part, op, vocab_group=group)]
    worst: list[Any] = [None] * RANKS
    dist.all_gather_object(worst, errors(part, whole, rank))
    row: dict[str, Any] = {"op": op.name, "losses": [one.item() for one in losses]}
    row["errors"] = {name: max(one[name] for one in worst) for name in worst[0]}
    if max(row["errors"].values()) > LARGEST_ERROR:
        raise ValueError(f"both ways must give the same gradients, got errors of {row['errors']}")
    runs = {"alone": lambda: call(whole, op), "together": lambda: call(part, op, vocab_group=group)}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    rng = random.Random(0)
    for _ in range(rounds):
        late = torch.tensor(time.monotonic() > deadline)
        dist.broadcast(late, src=0)  # the ranks' clocks may differ
        if late:
            break
        for name in rng.sample(list(runs), len(runs)):
            samples[name].append(timed(runs[name], rank, alone=name == "alone"))
    return row | {f"{name}_ms": values for name, values in samples.items()}


def per_flop(row: dict[str, Any]) -> list[float]:
    """Return the quartiles, over rounds, of time per FLOP: RANKS · together / alone."""
    ratios = RANKS * np.array(row["together_ms"]) / np.array(row["alone_ms"])
    return [float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75))]


def table(record: dict[str, Any]) -> str:
    """Write the rows as Markdown, under machine and command."""
    lines = [f"Shape {record['shape']}, {one_line(record['machine'])}", f"`{record['command']}`"]
    lines = ["\n\n".join(lines), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in record["rows"]:
        numbers = ["", "", OUT_OF_TIME]
        if row["together_ms"]:
            low, median, high = per_flop(row)
            numbers = [f"{np.median(row[f'{name}_ms']):,.0f}" for name in ("alone", "together")]
            numbers += [f"{median:.2f} ({low:.2f}-{high:.2f})"]
        numbers += [f"{error:.1e}" for error in row["errors"].values()]
        lines.append(f"| {row['op']} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def run_rank(rank: int, folder: str, args: argparse.Namespace) -> None:
    """Measure all operations in one of the processes; rank 0 writes the rows into the folder."""
    torch.set_num_threads(1)
    address = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    start, seconds = time.monotonic(), 60 * args.minutes
    rows = []
    for place, name in enumerate(args.ops, 1):
        deadline = start + seconds * place / len(args.ops)
        rows.append(rounds_of(OPS_BY_NAME[name], args.shape, rank, args.rounds, deadline))
    dist.barrier()
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main(argv: list[str]) -> None:
    """Measure, then write the record and its table, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.measures.vocab_ranks", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--shape", choices=SHAPES, default=default_shape().name)
    parser.add_argument(
        "--ops", nargs="+", choices=[op.name for op in KEY_OPS], default=[op.name for op in KEY_OPS]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=3.5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    typed = [word for word in argv if word not in ("--out", str(args.out))]
    command = shlex.join(["python", "-m", "bench.measures.vocab_ranks", "--out", "DIR", *typed])
    record = {"machine": machine_info(), "command": command, "shape": args.shape}
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run_rank, (folder, args), nprocs=RANKS)
        record["rows"] = json.loads(Path(folder, "rows.json").read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{NAME}-{args.shape}.json").write_text(json.dumps(record, indent=1) + "\n")
    text = table(record)
    (args.out / f"{NAME}-{args.shape}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
