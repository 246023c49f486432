"""Measures the sketched gradient: python -m bench.measures.sketch --out DIR [--shape cpu]

Writes sketch-SHAPE.json, .md and, with matplotlib, .png; --show FILE makes the last two again.
--counts measures errors, entries and flat rows of more thresholds alone, which another load of the
machine does not change, and writes counts-SHAPE.json and .md. In
each round the bare GEMMs of the exact gradient, the exact gradient and three thresholds of the
sketch run once, in an order drawn for it. Error: |gradient - exact| / |exact| in the Frobenius
norm, exact in float64; beside it that of operands rounded to bfloat16. Memory: growth beyond
inputs, outputs and gradients of one call, in a process of its own for each operation and profile.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from bench import definition
from bench.floor import Floor
from bench.inputs import SPREADS, Inputs, make_inputs
from bench.machine import clock, machine_info, one_line, set_up_cpu
from bench.measures import accuracy, memory
from bench.measures.timing import clear_gradients, sample_rounds, share
from bench.ops import OPS_BY_NAME, Op
from bench.shapes import SHAPES, Shape, default_shape
from kdrl_kernels.sketch import FINE

OPS = tuple(OPS_BY_NAME[name] for name in ("GRPO", "KDRL exact", "cross entropy"))
"""Cross entropy is taken as a later loss of linear_logprobs."""
DEFAULT = FINE
THRESHOLDS = (2e-3, 5e-4, DEFAULT)
BARE, EXACT, ROUNDED = "bare GEMMs", "exact", "bfloat16 operands"
Sketches = dict[str, kk.Sketch | None]
"""{name of a gradient: its sketch}."""


def sketches(thresholds: Iterable[float]) -> Sketches:
    """Return the exact gradient and a sketch of each threshold."""
    return {EXACT: None} | {
        f"{t:.0e}".replace("e-0", "e-"): kk.Sketch(threshold=t) for t in thresholds
    }


GRADIENTS = sketches(THRESHOLDS)
COUNTED = sketches((5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5))
COLUMNS = (
    *("operation", "profile", "gradient", "ms", "/ bare GEMMs", "extra MB", "entries a row"),
    *("flat rows", "error dX", "dW"),
)


def loss_of(inputs: Inputs, op: Op, sketch: kk.Sketch | None) -> tuple[Tensor, Any]:
    """Call this library; returns the loss and its metrics, none of linear_logprobs."""
    options: dict[str, Any] = {"backward": "sketch", "sketch": sketch} if sketch else {}
    head = inputs.hidden, inputs.shared_weight, inputs.tokens
    if op.cross_entropy:
        return -kk.linear_logprobs(*head, **options).logprobs.mean(), {}
    out = kk.kdrl_loss(
        *head,
        advantages=definition.advantages(inputs, op),
        old_logprobs=inputs.old_logprobs if op.old_logprobs else None,
        teacher=kk.TeacherHead(inputs.teacher_hidden, inputs.teacher_weight) if op.kd else None,
        objective=kk.Objective(policy="clip", kd=op.kd, kd_coef=1.0),
        **options,
    )
    return out.loss, out.metrics


def gradients(inputs: Inputs, op: Op, sketch: kk.Sketch | None) -> Any:
    """Call once, forward and backward; the gradients stay in inputs. Returns the metrics."""
    clear_gradients(inputs, op)
    loss, metrics = loss_of(inputs, op, sketch)
    loss.backward()
    return metrics


def sketch_metrics(inputs: Inputs, op: Op, metrics: Any, sketch: kk.Sketch) -> dict[str, float]:
    """Return entries a row, share of flat rows and the predicted error of a sketched gradient.

    linear_logprobs does not tell, so another loss does.
    """
    if op.cross_entropy:
        metrics = same_entries(inputs, sketch).metrics
    results = {name: metrics[name].item() / inputs.shape.N for name in ("entries", "flat_rows")}
    return results | {"predicted": metrics["sketch_noise"].item()}


def same_entries(inputs: Inputs, sketch: kk.Sketch) -> kk.LossOutput:
    """Call a cross entropy, whose coefficients are 1: it has the entries of linear_logprobs."""
    head = inputs.hidden, inputs.shared_weight, inputs.tokens
    options: dict[str, Any] = {"backward": "sketch", "sketch": sketch}
    return kk.linear_token_loss(*head, lambda rows: -rows.logprobs, **options)


def extra_bytes(shape: Shape, profile: str, op_name: str) -> dict[str, int]:
    """Measure the memory of each gradient in this process, one after the other."""
    memory.map_large_blocks()
    inputs, op = make_inputs(shape, profile), OPS_BY_NAME[op_name]

    def call(sketch: kk.Sketch | None) -> dict[str, Tensor]:
        gradients(inputs, op, sketch)
        return {}

    return {
        name: memory.growth(inputs, op, lambda: call(sketch))["extra_bytes"]  # noqa: B023
        for name, sketch in GRADIENTS.items()
    }


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call."""
    start = clock()
    call()
    return 1e3 * (clock() - start)


def _gradients_ms(inputs: Inputs, op: Op, sketch: kk.Sketch | None, seed: int) -> float:
    sketch = sketch and replace(sketch, seed=seed)
    return timed(lambda: gradients(inputs, op, sketch))


def errors(inputs: Inputs, truth: dict[str, Tensor]) -> dict[str, float]:
    """Compare the gradients in inputs with float64."""
    results = {}
    for name in ("hidden", "weight"):
        exact = truth[f"d{name}"]
        error = (getattr(inputs, name).grad.double() - exact).norm() / exact.norm()
        results[f"d{name}"] = error.item()
    return results


def rounded(inputs: Inputs) -> Inputs:
    """Return inputs whose hidden states and head are rounded to bfloat16."""
    copies = make_inputs(inputs.shape, inputs.profile)
    with torch.no_grad():
        for tensor in (copies.hidden, copies.weight, copies.teacher_hidden, copies.teacher_weight):
            tensor.copy_(tensor.bfloat16())
    return copies


def measure(op: Op, inputs: Inputs, cases: Sketches = GRADIENTS) -> dict[str, Any]:
    """Measure errors and entries of one operation; the row of a table, without memory and times."""
    truth = accuracy.exact(inputs, op)
    row: dict[str, Any] = {"op": op.name, "profile": inputs.profile, "cases": {}}
    for name, sketch in cases.items():
        metrics = gradients(inputs, op, sketch)
        case: dict[str, Any] = {"errors": errors(inputs, truth)}
        row["cases"][name] = case
        if sketch is not None:
            case |= sketch_metrics(inputs, op, metrics, sketch)
    coarse = rounded(inputs)
    gradients(coarse, op, None)
    row["cases"][ROUNDED] = {"errors": errors(coarse, truth)}
    clear_gradients(inputs, op)
    return row


def add_memory(row: dict[str, Any], op: Op, inputs: Inputs) -> dict[str, Any]:
    """Add the memory of one operation to its row, and return it."""
    try:
        sizes = memory.alone(extra_bytes, inputs.shape, inputs.profile, op.name)
    except RuntimeError as error:  # the times still stand
        row["memory"], sizes = str(error), {}
    for name, size in sizes.items():
        row["cases"][name]["extra_bytes"] = size
    return row


def add_times(
    row: dict[str, Any], op: Op, inputs: Inputs, rounds: int, deadline: float
) -> dict[str, Any]:
    """Add the times of one operation to its row, and return it."""
    floor = Floor(inputs)
    twice = 2 if op.cross_entropy else 1  # the exact backward pass projects again
    calls: dict[str, Callable[[int], float]] = {
        BARE: lambda _: timed(lambda: floor.run(op, inputs, twice))
    }
    for name, sketch in GRADIENTS.items():
        calls[name] = partial(_gradients_ms, inputs, op, sketch)
    samples = sample_rounds(calls, rounds, deadline)
    for name, sample in samples.items():
        case = row["cases"].setdefault(name, {})
        if sample.values:
            ratios = [a / b for a, b in zip(sample.values, samples[BARE].values, strict=True)]
            case |= {"ms": statistics.median(sample.values), "ratio": statistics.median(ratios)}
        case["status"] = sample.status
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        for name, case in row["cases"].items():
            numbers = [
                _milliseconds(case["ms"]) if "ms" in case else "",
                f"{case['ratio']:.2f}" if "ratio" in case else "",
                f"{case['extra_bytes'] / 1e6:,.1f}" if "extra_bytes" in case else "",
                f"{case['entries']:.1f}" if "entries" in case else "",
                f"{case['flat_rows']:.1%}" if "flat_rows" in case else "",
                *(f"{error:.1e}" for error in case.get("errors", {}).values()),
                *[""] * (2 - len(case.get("errors", {}))),
            ]
            lines.append(f"| {row['op']} | {row['profile']} | {name} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def _milliseconds(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def document(record: dict[str, Any]) -> str:
    """Write the machine and the table of a record."""
    return f"Shape {record['shape']}, {one_line(record['machine'])}\n\n{table(record['rows'])}"


def file_of(record: dict[str, Any], folder: Path, kind: str = "sketch") -> Path:
    """Return where the record of a shape lies."""
    return folder / f"{kind}-{record['shape']}.json"


def count(shape: Shape, profiles: list[str], ops: Iterable[Op], folder: Path) -> None:
    """Write errors, entries and flat rows of these operations and profiles."""
    record: dict[str, Any] = {"machine": machine_info(), "shape": shape.name, "rows": []}
    path = file_of(record, folder, "counts")
    for profile in profiles:
        inputs = make_inputs(shape, profile)
        for op in ops:
            record["rows"].append(measure(op, inputs, COUNTED))
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(table(record["rows"][-1:]), flush=True)
    path.with_suffix(".md").write_text(document(record), encoding="utf-8")


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write the record of a run and its table; return where the record lies."""
    path = file_of(record, folder)
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(document(record), encoding="utf-8")
    return path


def write(record: dict[str, Any], folder: Path) -> None:
    """Write the record of a run, its table, and its plot where there is matplotlib."""
    path = save(record, folder)
    if importlib.util.find_spec("matplotlib"):
        from bench.reporting.tradeoff import plot  # noqa: PLC0415  not everywhere: matplotlib

        plot(record, path.with_suffix(".png"))


def main() -> None:
    """Measure all operations and profiles, or show those of a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.measures.sketch", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for the results")
    what.add_argument("--show", type=Path, help="a sketch-SHAPE.json, measured before")
    parser.add_argument("--shape", choices=SHAPES, default=default_shape().name)
    parser.add_argument("--profiles", nargs="+", choices=SPREADS, default=list(SPREADS))
    names = [op.name for op in OPS]
    parser.add_argument("--ops", nargs="+", choices=names, default=names)
    parser.add_argument("--no-memory", action="store_true", help="errors and times alone")
    parser.add_argument("--counts", action="store_true", help="no times, no memory")
    parser.add_argument("--times", action="store_true", help="times anew, in the file of --out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=15, help="for the times")
    args = parser.parse_args()
    if args.show:
        write(json.loads(args.show.read_text()), args.show.parent)
        return
    set_up_cpu()
    args.out.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[args.shape]
    ops = [OPS_BY_NAME[name] for name in args.ops]
    if args.counts:
        count(shape, args.profiles, ops, args.out)
        return
    cases = [(op, profile) for profile in args.profiles for op in ops]
    record = {"machine": machine_info(), "shape": args.shape, "rows": []}
    if args.times:
        record |= {"rows": json.loads(file_of(record, args.out).read_text())["rows"]}
        cases = [(OPS_BY_NAME[row["op"]], row["profile"]) for row in record["rows"]]
    else:
        for op, profile in cases:
            inputs = make_inputs(shape, profile)
            record["rows"].append(measure(op, inputs))
            if not args.no_memory:
                add_memory(record["rows"][-1], op, inputs)
            save(record, args.out)
    rows = record["rows"]
    print(f"errors and memory: {args.out}; times follow, on an idle machine", flush=True)
    deadline = time.monotonic() + 60 * args.minutes
    for place, (op, profile) in enumerate(cases):
        until = share(deadline, place, len(cases))
        add_times(rows[place], op, make_inputs(shape, profile), args.rounds, until)
        save(record, args.out)
        print(table([rows[place]]), flush=True)
    write(record, args.out)


if __name__ == "__main__":
    main()
