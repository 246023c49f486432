"""Tests that bench/README.md has the figures of the committed results."""

from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
TABLE = (BENCH / "results/cpu-2-cores/table.md").read_text("utf-8")
README = (BENCH / "README.md").read_text("utf-8")


def test_rows_are_those_of_the_committed_table() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| ") and "cores" not in line]
    figures = [row for row in rows if row.count("|") == 11]
    assert len(figures) == 5  # heading, rule and three operations
    assert [row for row in figures if row not in TABLE.splitlines()] == []


def test_every_loss_of_time_and_memory_is_listed() -> None:
    losses = TABLE.split("## Where it loses")[1].split("## All figures")[0]
    time, memory = (losses.split(name)[1].split("\n\n")[1] for name in ("Slower", "More memory"))
    section = README.split("## Where it loses")[1].split("**Accuracy")[0]
    lines = time.splitlines() + memory.splitlines()
    ratios = [line.split(" of our")[0].rsplit(" ", 1)[1] for line in lines]
    assert len(ratios) == 28
    words = section.replace(",", " ").replace(";", " ").replace(". ", " ").split()
    listed = sorted(word.rstrip(".") for word in words if word.startswith("0."))
    assert listed == sorted(ratios)
