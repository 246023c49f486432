"""Measures the sketched gradient: python -m bench.measures.sketch --out DIR [--shape cpu]

In each round the bare GEMMs of the exact gradient, the exact gradient and three thresholds of the
sketch run once, in an order drawn for it. Error: |gradient - exact| / |exact| in the Frobenius
norm, exact in float64; beside it that of operands rounded to bfloat16. Memory: growth beyond
inputs, outputs and gradients of one call in a process of its own.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from bench import definition
from bench.floor import Floor
from bench.inputs import PROFILES, Inputs, make_inputs
from bench.machine import clock, machine_info, one_line, use_threads
from bench.measures import accuracy
from bench.measures.timing import sample_rounds
from bench.ops import OPS_BY_NAME, Op
from bench.shapes import SHAPES

OPS = tuple(OPS_BY_NAME[name] for name in ("GRPO", "KDRL exact", "cross entropy"))
"""Cross entropy is taken as a later loss of linear_logprobs."""
THRESHOLDS = (2**-8, 2**-10, 2**-12)
BARE, EXACT, ROUNDED = "bare GEMMs", "exact", "bfloat16 operands"


def loss_of(inputs: Inputs, op: Op, threshold: float | None, seed: int) -> Any:
    """Call this library; returns its output."""
    options: dict[str, Any] = {}
    if threshold is not None:
        options = {"backward": "sketch", "sketch": kk.Sketch(threshold=threshold, seed=seed)}
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


def gradients(inputs: Inputs, op: Op, threshold: float | None, seed: int = 0) -> dict[str, Any]:
    """Call once, forward and backward; the gradients stay in inputs. Returns the metrics."""
    inputs.hidden.grad = inputs.weight.grad = None
    loss, metrics = loss_of(inputs, op, threshold, seed)
    loss.backward()
    return {name: value.item() for name, value in metrics.items()}


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call."""
    start = clock()
    call()
    return 1e3 * (clock() - start)


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


def measure(op: Op, inputs: Inputs, rounds: int, deadline: float) -> dict[str, Any]:
    """Measure one operation; the row of a table."""
    truth = accuracy.exact(inputs, op)
    names: dict[str, float | None] = {EXACT: None}
    names |= {f"2^{t.hex().split('p')[1]}": t for t in THRESHOLDS}
    row: dict[str, Any] = {"op": op.name, "profile": inputs.profile, "cases": {}}
    for name, threshold in names.items():
        metrics = gradients(inputs, op, threshold)
        case = row["cases"][name] = {"errors": errors(inputs, truth)}
        if "entries" in metrics:
            case |= {"entries": metrics["entries"] / inputs.shape.N}
            case |= {"predicted": metrics["sketch_noise"]}
    coarse = rounded(inputs)
    gradients(coarse, op, None)
    row["cases"][ROUNDED] = {"errors": errors(coarse, truth)}
    del truth, coarse
    floor = Floor(inputs)
    twice = 2 if op.cross_entropy else 1  # the exact backward pass projects again
    calls: dict[str, Callable[[int], float]] = {
        BARE: lambda _: timed(lambda: floor.run(op, inputs, twice))
    }
    for name, threshold in names.items():
        calls[name] = lambda n, t=threshold: timed(lambda: gradients(inputs, op, t, n))  # type: ignore[misc]
    samples = sample_rounds(calls, rounds, deadline)
    for name, sample in samples.items():
        case = row["cases"].setdefault(name, {})
        if sample.values:
            ratios = [a / b for a, b in zip(sample.values, samples[BARE].values, strict=True)]
            case |= {"ms": statistics.median(sample.values), "ratio": statistics.median(ratios)}
        case["status"] = sample.status
    inputs.hidden.grad = inputs.weight.grad = None
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as Markdown."""
    lines = [
        "| operation | profile | gradient | ms | / bare GEMMs | entries a row | error dX | dW |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        for name, case in row["cases"].items():
            numbers = [
                f"{case['ms']:,.0f}" if "ms" in case else "",
                f"{case['ratio']:.2f}" if "ratio" in case else "",
                f"{case['entries']:.1f}" if "entries" in case else "",
                *(f"{error:.1e}" for error in case.get("errors", {}).values()),
            ]
            lines.append(f"| {row['op']} | {row['profile']} | {name} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all operations and profiles, and write sketch.json and sketch.md."""
    parser = argparse.ArgumentParser(prog="python -m bench.measures.sketch", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    use_threads()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    cases = [(op, profile) for profile in PROFILES for op in OPS]
    deadline = time.monotonic() + 60 * args.minutes
    for place, (op, profile) in enumerate(cases):
        until = time.monotonic() + (deadline - time.monotonic()) / (len(cases) - place)
        rows.append(measure(op, make_inputs(SHAPES[args.shape], profile), args.rounds, until))
        machine = machine_info()
        record = {"machine": machine, "shape": args.shape, "rows": rows}
        name = f"sketch-{args.shape}"
        (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        text = f"Shape {args.shape}, {one_line(machine)}\n\n{table(rows)}"
        (args.out / f"{name}.md").write_text(text, encoding="utf-8")
        print(table(rows[-1:]), flush=True)


if __name__ == "__main__":
    main()
