"""Compares the small probabilities of the bench's rows with those of a trained model.

    KDRL_DATA=DATA python -m bench.measures.tails --out DIR

What a sketch costs and misses is decided by the tail of a row, its probabilities below the
threshold. A small model learns a few documents of GSM8K (DATA/gsm8k/train.jsonl), again and again,
so that it becomes sure of some of their tokens. Rows of equal entropy are then compared with those
of the profiles. Writes tails.json and .md.
"""

import argparse
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.inputs import make_inputs
from bench.learning.text import Corpus, load_corpus
from bench.machine import machine_info, one_line, set_up_cpu
from bench.shapes import SHAPES
from kdrl_train.tools.toy.models import ArchitectureConfig, make_model

SHAPE = SHAPES["cpu-small"]
ARCHITECTURE = ArchitectureConfig(family="llama", hidden=96, layers=2, intermediate=256)
DOCUMENTS, LENGTH, SEQUENCES, RATE = 60, 128, 4, 5e-3
THRESHOLD = 2.0**-11
BANDS = (0.01, 0.3, 1.0, 2.0, 3.0, 4.0, 5.0, 8.0)
"""Bounds of the entropies that are put together, in nats."""
FEWEST = 5
"""Rows from which a mean is shown."""


def trained(corpus: Corpus, steps: int) -> tuple[Tensor, float]:
    """Train a model; return log-probabilities of tokens that it learnt from, and its loss there."""
    model = make_model(ARCHITECTURE, corpus.tokenizer, seed=0)
    weight = model.lm_head.weight
    stepper = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    stream, rng = torch.cat(corpus.train[:DOCUMENTS]), torch.Generator().manual_seed(0)
    whole = (len(stream) - 1) // LENGTH * LENGTH
    inputs, targets = (stream[i : i + whole].view(-1, LENGTH) for i in (0, 1))
    for _ in range(steps):
        part = torch.randint(len(inputs), (SEQUENCES,), generator=rng)
        hidden = model.model(inputs[part]).last_hidden_state.flatten(0, 1)
        loss = F.cross_entropy(hidden @ weight.T, targets[part].flatten())
        stepper.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
    with torch.no_grad():
        few = slice(0, 4 * SEQUENCES)
        hidden = model.model(inputs[few]).last_hidden_state.flatten(0, 1)
        logp = (hidden @ weight.T).log_softmax(dim=1)
    return logp, F.nll_loss(logp, targets[few].flatten()).item()


@torch.no_grad()
def of_profile(profile: str) -> Tensor:
    """Return the student's log-probabilities of a profile."""
    inputs = make_inputs(SHAPE, profile)
    return (inputs.hidden @ inputs.weight.T).log_softmax(dim=1)


def bands(logp: Tensor) -> list[dict[str, float] | None]:
    """Return, for each band of the entropy, rows, tail and entries a row; None: too few rows."""
    p = logp.exp()
    entropy = -(p * logp).sum(dim=1)
    results: list[dict[str, float] | None] = []
    for low, high in pairwise(BANDS):
        rows = p[(entropy >= low) & (entropy < high)]
        results.append(
            {
                "rows": len(rows),
                "tail": rows.where(rows < THRESHOLD, 0).sum(dim=1).mean().item(),
                "entries": (rows / THRESHOLD).clamp(max=1).sum(dim=1).mean().item(),
            }
            if len(rows) >= FEWEST
            else None
        )
    return results


def table(sources: dict[str, Any]) -> str:
    """Write the bands as Markdown: share below the threshold, and entries a row."""
    lines = [f"| entropy, nats | {' | '.join(sources)} |", "|---" * (len(sources) + 1) + "|"]
    for place, (low, high) in enumerate(pairwise(BANDS)):
        cells = [source[place] for source in sources.values()]
        texts = ["" if x is None else f"{x['tail']:.2%}, {x['entries']:.0f}" for x in cells]
        lines.append(f"| {low:g} to {high:g} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train the model, and write both tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.measures.tails", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, default=200, help="of the training")
    args = parser.parse_args()
    set_up_cpu()
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(Path(os.environ["KDRL_DATA"]) / "gsm8k", SHAPE.V)
    logp, loss = trained(corpus, args.steps)
    sources = {"model": bands(logp)}
    sources |= {profile: bands(of_profile(profile)) for profile in ("rl", "reasoning", "hard")}
    machine = machine_info()
    record = {"machine": machine, "steps": args.steps, "loss": loss}
    record |= {"bands": BANDS, "sources": sources}
    (args.out / "tails.json").write_text(json.dumps(record, indent=1) + "\n")
    text = (
        f"Share of probabilities below 2^-11, entries a row; V = {SHAPE.V:,}; model after "
        f"{args.steps} steps, loss {loss:.2f}; {one_line(machine)}\n\n"
        f"{table(sources)}"
    )
    (args.out / "tails.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
