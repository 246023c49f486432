"""Compares what the probability of a sketch's entry may follow, at equal numbers of entries.

    python -m bench.measures.importance --out DIR [--shape cpu]

The sketch keeps an entry with a probability proportional to p. The least variance for a number of
entries has one proportional to |dL/dz|, with the same threshold for all rows. Between them lies a
choice of blocks of 64 columns by p, and of the columns of a block by |dL/dz|, which reads no more
than the first. All errors of dX are predicted by the formula of kdrl_kernels/rows/SKETCH.md, for
GRPO with a reverse KL of coefficient beta; nothing is drawn. Rows that are flat by p are left out.
Writes importance-SHAPE.json and .md.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdrl_kernels as kk
from bench import definition
from bench.inputs import LIFTED, SAMPLE_ROWS, Inputs, make_inputs
from bench.machine import machine_info, one_line, set_up_cpu
from bench.ops import OPS_BY_NAME
from bench.shapes import SHAPES, default_shape
from kdrl_kernels.rows.entries import BLOCK
from kdrl_kernels.token_rows import Coefficients

GRPO, KDRL = OPS_BY_NAME["GRPO"], OPS_BY_NAME["KDRL exact"]
BETAS = (2e-3, 0.1, 1.0)
"""The first is KDRL's, the last that of "KDRL exact" in the other benches."""
THRESHOLDS = (2.0**-8, 2.0**-11)
COLUMNS = (
    *("profile", "beta", "threshold", "flat rows", "entries a row"),
    *("error by p", "by p, then dL/dz", "by dL/dz", "p / dL/dz"),
)
HALVINGS = 20
"""Halvings of the interval in which log2 of a threshold lies."""


@torch.no_grad()
def row_gradients(inputs: Inputs, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return p and dL/dz [N, V], but 0 at the sampled tokens, and the squares of whole rows [N]."""
    ps, dzs, squares = [], [], []
    for start in range(0, len(inputs.tokens), SAMPLE_ROWS):
        part = slice(start, start + SAMPLE_ROWS)
        logp = definition.student_logprobs(inputs, GRPO, part)
        logq = definition.teacher_logprobs(inputs, KDRL, part)
        p, A, tokens = logp.exp(), inputs.advantages[part, None], inputs.tokens[part, None]
        log_ratio = logp - logq
        kl = (p * log_ratio).sum(dim=1, keepdim=True)
        dz = p * (A + beta * (log_ratio - kl))
        squares.append(dz.scatter_add(1, tokens, -A).square().sum(dim=1))
        ps.append(p.scatter(1, tokens, 0))
        dzs.append(dz.scatter(1, tokens, 0))
    return torch.cat(ps), torch.cat(dzs), torch.cat(squares)


def blocks(values: Tensor) -> Tensor:
    """View [N, V] as [N, blocks, BLOCK], with zeros at the end of a row where V needs them."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % BLOCK))
    return padded.unflatten(1, (-1, BLOCK))


def within_blocks(lengths: Tensor, dz: Tensor) -> Tensor:
    """Share the sum of lengths of each block among its columns as |dz| is, [N, V]."""
    sizes = blocks(dz.abs())
    shares = sizes / sizes.sum(dim=2, keepdim=True).clamp(min=torch.finfo(dz.dtype).tiny)
    return (shares * blocks(lengths).sum(dim=2, keepdim=True)).flatten(1)[:, : dz.shape[1]]


def threshold_with(entries: float, chance: Callable[[float], Tensor]) -> float:
    """Return the threshold at which an expected number of entries is kept."""
    low, high = -30.0, 10.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(2**middle).sum() > entries else (low, middle)
    return 2**low


def error(dz: Tensor, chance: Tensor, squares: Tensor) -> float:
    """Predict the relative error of dX; squares is a sum over all rows, flat ones too."""
    variance = dz.square() * (1 - chance) / chance
    return (variance.where(dz != 0, 0).sum() / squares.sum()).sqrt().item()


def compare(inputs: Inputs, beta: float, threshold: float) -> dict[str, Any]:
    """Return the errors of the three choices, with the number of entries that the first has."""
    p, dz, squares = row_gradients(inputs, beta)
    N, V = p.shape
    coef = Coefficients(-inputs.advantages, kl=torch.full_like(inputs.advantages, beta))
    sketch = kk.Sketch(threshold=threshold).of_head(p, V)
    grid = sketch.grid(slice(0, N), V, coef)
    lengths = p / grid.thresholds[:, None].to(p.dtype)
    flat = lengths.clamp(max=1).sum(dim=1) > grid.most_entries
    lengths, dz = lengths[~flat], dz[~flat]
    by_p = lengths.clamp(max=1)

    def error_by(importance: Tensor) -> float:
        def chance(threshold: float) -> Tensor:
            return (importance / threshold).clamp(max=1)

        return error(dz, chance(threshold_with(by_p.sum().item(), chance)), squares)

    return {
        "profile": inputs.profile,
        "beta": beta,
        "threshold": threshold,
        "flat_rows": flat.double().mean().item(),
        "entries": by_p.sum().item() / N,
        "error_p": error(dz, by_p, squares),
        "error_blocks": error_by(within_blocks(lengths, dz)),
        "error_dz": error_by(dz.abs()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        power = row["threshold"].hex().split("p")[1]
        lines.append(
            f"| {row['profile']} | {row['beta']:g} | 2^{power} | {row['flat_rows']:.1%} | "
            f"{row['entries']:.1f} | {row['error_p']:.1e} | {row['error_blocks']:.1e} | "
            f"{row['error_dz']:.1e} | "
            f"{row['error_p'] / row['error_dz']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare both choices in the profiles with easy and hard rows."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.measures.importance", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--shape", choices=SHAPES, default=default_shape().name)
    args = parser.parse_args()
    set_up_cpu()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for profile in LIFTED:
        inputs = make_inputs(SHAPES[args.shape], profile)
        rows += [compare(inputs, beta, t) for beta in BETAS for t in THRESHOLDS]
    record = {"machine": machine_info(), "shape": args.shape, "rows": rows}
    path = args.out / f"importance-{args.shape}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    text = f"Shape {args.shape}, {one_line(record['machine'])}\n\n{table(rows)}"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
