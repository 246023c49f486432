"""Compares what a model learns with the exact gradient of its head, a sketch, and a biased filter.

    KDRL_DATA=... python -m bench.learning --out DIR

Small Llamas learn the next token of GSM8K's text, each with the gradient, optimizer and seed of its
run; all read each token once. The learning rate of an optimizer is the best one for the exact
gradient at seed 0. results.json is written anew after every run, and a second start with the same
DIR goes on after the last of them. It ends as learning.md and a plot for each optimizer.
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench import results_file
from bench.learning.text import Corpus, load_corpus
from bench.learning.trial import LOSSES_EVERY, OPTIMIZERS, HeadGradient, Sizes, run
from bench.machine import one_line
from bench.results_file import Record, Run
from bench.study.statistics import mean_over_seeds
from kdrl_train.tools.report import charts

EXACT = HeadGradient("exact")
FINE, COARSE = 2.0**-11, 2.0**-6
GRADIENTS = (EXACT, *(HeadGradient(k, t) for k in ("sketch", "dropped") for t in (FINE, COARSE)))
RATES = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3), "sgd": (0.1, 0.3, 1.0, 3.0)}
"""Learning rates that the exact gradient tries, lowest first."""
HEAD = """\
| optimizer | gradient | entries a row | validation loss | less exact | rare tokens | less exact |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Run what is missing in the folder, and write its table and plots."""
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    compare(args.out, Path(os.environ["KDRL_DATA"]) / "gsm8k", Sizes(), args.seeds)


def compare(out: Path, data: Path, sizes: Sizes, seeds: int) -> None:
    """Do all runs that the folder does not hold yet."""
    results = open_results(out, sizes)
    corpus = load_corpus(data, sizes.vocab_size)
    for optimizer, rates in RATES.items():
        for rate in rates:
            ensure(results, out, corpus, EXACT, optimizer, rate, 0)
    for seed in range(seeds):
        for optimizer in OPTIMIZERS:
            for gradient in GRADIENTS:
                rate = best_rate(results["records"], optimizer)
                ensure(results, out, corpus, gradient, optimizer, rate, seed)
    results_file.save(results, out, done=True)
    (out / "learning.md").write_text(text(results), encoding="utf-8")
    for optimizer in OPTIMIZERS:
        charts.save(plot(results["records"], optimizer), out / f"{optimizer}.svg")


def open_results(out: Path, sizes: Sizes) -> Run:
    """Read the results in a folder, or begin new ones.

    Raises: ValueError where they are of other sizes.
    """
    if not (out / results_file.NAME).exists():
        return results_file.new_run("python -m bench.learning") | {"sizes": asdict(sizes)}
    results = results_file.load(out)
    if results.get("sizes") != asdict(sizes):
        raise ValueError(
            f"{out} must hold runs of {asdict(sizes)}, got {results.get('sizes')}: "
            "give another folder"
        )
    return results


def ensure(
    results: Run,
    out: Path,
    corpus: Corpus,
    gradient: HeadGradient,
    optimizer: str,
    rate: float,
    seed: int,
) -> None:
    """Do a run, unless the results hold it, and write it into the folder."""
    case = {"gradient": gradient.name, "optimizer": optimizer, "rate": rate, "seed": seed}
    if any(case.items() <= record.items() for record in results["records"]):
        return
    measured = run(Sizes(**results["sizes"]), corpus, gradient, optimizer, rate, seed)
    results["records"].append({"kind": "learning", **case, **measured})
    results_file.save(results, out)
    print(*case.values(), f"loss {measured['all']:.3f}, rare {measured['rare']:.3f}", flush=True)


def best_rate(records: list[Record], optimizer: str) -> float:
    """Return the learning rate with which the exact gradient of seed 0 has the lowest loss."""
    return min(tried(records, optimizer), key=lambda record: record["all"])["rate"]


def tried(records: list[Record], optimizer: str) -> list[Record]:
    """Return the runs of the exact gradient at seed 0, one a learning rate."""
    case = {"gradient": EXACT.name, "optimizer": optimizer, "seed": 0}.items()
    return [record for record in records if case <= record.items()]


def compared(records: list[Record], optimizer: str) -> dict[HeadGradient, list[Record]]:
    """Return the runs of each gradient at the best learning rate, by seed."""
    rate = best_rate(records, optimizer)
    groups: dict[HeadGradient, list[Record]] = {}
    for gradient in GRADIENTS:
        case = {"gradient": gradient.name, "optimizer": optimizer, "rate": rate}.items()
        chosen = [record for record in records if case <= record.items()]
        groups[gradient] = sorted(chosen, key=lambda record: record["seed"])
    return groups


def text(results: Run) -> str:
    """Write machine, learning rates and table."""
    records, lines, rates = results["records"], [], []
    for optimizer in OPTIMIZERS:
        groups = compared(records, optimizer)
        for gradient, runs in groups.items():
            cells = [optimizer, gradient.name, f"{mean(runs, 'entries'):,.0f}"]
            for name in ("all", "rare"):
                cells += [f"{mean(runs, name):.3f}"]
                cells += ["" if gradient == EXACT else difference(runs, groups[EXACT], name)]
            lines.append(f"| {' | '.join(cells)} |\n")
        tries = sorted(tried(records, optimizer), key=lambda record: record["rate"])
        rates += [f"{optimizer} {one['rate']:g}: {one['all']:.3f}" for one in tries]
    seeds = len({record["seed"] for record in records})
    return (
        f"{one_line(results['machine'])}\n\nSeeds: {seeds}. Validation loss of the exact gradient "
        f"at seed 0 by learning rate: {', '.join(rates)}.\n\n{HEAD}{''.join(lines)}"
    )


def mean(runs: list[Record], name: str) -> float:
    """Return the mean of one figure over runs."""
    return sum(one[name] for one in runs) / len(runs)


def difference(runs: list[Record], exact: list[Record], name: str) -> str:
    """Write the mean difference of two gradients over the same seeds, with its 95% interval."""
    pairs = [one[name] - other[name] for one, other in zip(runs, exact, strict=True)]
    pair = mean_over_seeds(np.array(pairs)[:, None])
    interval = f" ({pair.low:+.3f} to {pair.high:+.3f})" if pair.seeds > 1 else ""
    return f"{pair.mean:+.3f}{interval}"


def plot(records: list[Record], optimizer: str) -> str:
    """Draw the training losses of each gradient: mean, lowest and highest seed."""
    lines = []
    for look, (gradient, runs) in enumerate(compared(records, optimizer).items()):
        losses = np.array([record["losses"] for record in runs])
        x = [LOSSES_EVERY * (i + 1) for i in range(losses.shape[1])]
        y, low, high = (f(axis=0).tolist() for f in (losses.mean, losses.min, losses.max))
        lines.append(charts.Series(gradient.name, x, y, look, low, high))
    title = f"{optimizer}: loss of text that is read for the first time, nats a token"
    return charts.line_chart(lines, title=title)


if __name__ == "__main__":
    main()
