"""Writes the two pages of a report: markdown, and HTML in one file that loads nothing."""

import base64
import html
from dataclasses import dataclass
from pathlib import Path

import jinja2

from bench import machine
from bench.reporting import figures, sections
from bench.reporting.losses import KINDS, Loss, losses
from bench.reporting.tables import MARK, FigureTable, markdown, number
from bench.results_file import Run

TEMPLATE = "report.html.j2"
READINGS = {"clock_mhz": ("clock", "MHz"), "temperature_c": ("temperature", "°C")}
READINGS |= {"power_w": ("power", "W")}
PLOTS = {
    "time.png": "Time",
    "memory.png": "Memory",
    "accuracy.png": "Accuracy",
    "scaling.png": "Scaling",
}
"""File names in a report's folder."""
NOTES = (
    "In every round each provider is called once, in an order drawn for that round, on inputs that "
    "alternate: what slows the machine for a while slows all of them alike. Figures are medians "
    "over rounds, quartiles in brackets.",
    "Floor: nothing but the GEMMs that the operation cannot do without, into buffers that exist, "
    "in the same rounds. `/ floor` is the median over rounds of time / floor time; share of floor "
    "the same upside down; TFLOP/s counts the FLOP of those GEMMs alone, whatever a provider "
    "computes twice.",
    "`/ ours` is the median over rounds of the provider's time / ours: above 1 ours is faster. "
    f"{MARK} marks what is to our disadvantage: `/ ours` below 1, less memory, a smaller error of "
    "dX, and a ratio of ours above its target. ≈: the two were timed in different runs, so it is a "
    "ratio of two medians.",
    "Times of different operations were taken minutes apart: compare them by their ratios. The "
    "loss is not scaled before its backward pass, so who takes gradients in the forward pass has "
    "nothing left to do there.",
    "Our sketch takes another gradient, right on average and with noise, from the same outputs. It "
    "is no peer: short tables have a row for it, and its error is not marked.",
    "Who computes something else (`differs`), fails, or does not offer the operation has no "
    "figure, and the reason in its place. Liger's Triton GRPO loss takes one advantage a sequence; "
    "here each token has its own, which costs it a padded copy of the logits.",
    "Extra memory: the peak beyond inputs, outputs and gradients, of a process of its own, in MB "
    "of 10^6 bytes; differences of less than half a MB are not marked. Errors: |result - exact| "
    "against float64, relative to max|exact|: the largest, and the 99.9% quantile.",
    "A whole step is forward and backward of the student, without an optimiser step, a rollout, or "
    "the teacher's own layers. On a CPU the copy beside the row kernels may stay in the cache.",
)


@dataclass(frozen=True, slots=True)
class Report:
    """The content of a report: everything that the pages show."""

    machine: str
    facts: tuple[tuple[str, str], ...]
    """(what, value) of the head of the page."""
    unfinished: bool
    short: tuple[FigureTable, ...]
    losses: dict[str, list[Loss]]
    full: tuple[FigureTable, ...]
    more: tuple[FigureTable, ...]
    """Scaling, step, rows."""


def make(run: Run) -> Report:
    """Make the tables and sentences of a run."""
    shapes = figures.groups(run)
    others = (sections.step_table(run), sections.rows_table(run))
    return Report(
        machine.one_line(run["machine"]),
        _facts(run),
        run.get("finished") is None,
        tuple(sections.short(group) for group in shapes),
        losses(shapes),
        tuple(sections.full(group) for group in shapes),
        (*sections.scaling_tables(run), *(table for table in others if table)),
    )


def _facts(run: Run) -> tuple[tuple[str, str], ...]:
    facts = [("machine", machine.one_line(run["machine"]))]
    if run.get("commits"):
        facts.append(("commits", "figures of several: " + ", ".join(run["commits"])))
    facts.append(("command", run["command"]))
    facts.append(("started", run.get("started") or "not known"))
    facts.append(("finished", run.get("finished") or "stopped before it was done"))
    facts += [("failed", stage) for stage in run.get("failed", [])]
    rounds = figures.rounds(run)
    if rounds:
        fewest, most = rounds
        facts.append(("rounds", str(most) if fewest == most else f"{fewest} to {most}"))
    for name, (low, high) in figures.clock_ranges(run).items():
        what, unit = READINGS.get(name, (name, ""))
        both = number(low) if low == high else f"{number(low)} to {number(high)}"
        facts.append((what, f"{both} {unit}".strip()))
    return tuple(facts)


def as_markdown(report: Report) -> str:
    """Write table.md."""
    parts = ["# Benchmark report"]
    if report.unfinished:
        parts.append("**This run was stopped before it was done: what follows is a part of it.**")
    parts.append("\n".join(f"- {name}: {value}" for name, value in report.facts))
    parts += [markdown(table, "##") for table in report.short]
    parts.append("## Where it loses")
    if not report.losses:
        parts.append("Nowhere in these figures.")
    for kind, some in report.losses.items():
        sentences = "\n".join(f"- {one.sentence}" for one in some)
        parts.append(f"{KINDS[kind]} ({len(some)}):\n\n{sentences}")
    for title, tables in (("All figures", report.full), ("More", report.more)):
        if tables:
            parts += [f"## {title}", *(markdown(table) for table in tables)]
    parts += ["## How it was measured", "\n".join(f"- {note}" for note in NOTES)]
    return "\n\n".join(parts) + "\n"


def as_html(report: Report, folder: Path) -> str:
    """Write report.html, with the plots that exist in the folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["code"] = _code
    plots = [
        (title, base64.b64encode((folder / name).read_bytes()).decode())
        for name, title in PLOTS.items()
        if (folder / name).exists()
    ]
    return environment.get_template(TEMPLATE).render(
        report=report, plots=plots, kinds=KINDS, notes=NOTES, mark=MARK
    )


def _code(text: str) -> str:
    """Turn `so` into <code>so</code>."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))
