"""Writes the tables, plots and pages of a study: README.md, *.svg and report*.html in its folder.

`python -m bench.study.write_up FOLDER` writes them again from the results.json of the folder.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from bench.study import analysis, plots, results, tables
from bench.study.analysis import Study
from bench.study.config import StudyConfig
from bench.study.trial import trial_folder
from kdrl_train.config_file import update
from kdrl_train.tools import report
from kdrl_train.tools.report import Block, Figure, Folded, Note, Table, charts

PAGED = (
    "grpo", "kd_rkl", "kdrl", "kdrl_annealed", "kdrl_exact", "kdrl_masked", "reward_shaping",
    "k1_as_loss",
)  # fmt: skip
"""Arms whose runs are drawn step by step on the pages; more lines would be hard to tell apart."""


@dataclass(frozen=True, slots=True)
class TableSection:
    """A section of the write-up: a table, and the plots that belong to it."""

    table: Table
    plots: Mapping[str, str] = field(default_factory=dict)
    """SVG texts by file name without suffix."""
    folded: bool = False
    """Whether it is shown on a click alone: it is long and seldom read."""


def write(config: StudyConfig, saved: Mapping[str, Any]) -> None:
    """Write README.md, plots and pages from what results.save returned, as far as runs exist."""
    study = Study(saved["trials"])
    tasks = [task for task in config.tasks if study.arms(task)]
    sections = make_sections(study, config, tasks)
    for section in sections:
        for name, svg in section.plots.items():
            charts.save(svg, config.out / f"{name}.svg")
    machine = saved["machine"]
    commits = sorted({run.commit for run in study.results if run.commit})
    about = (
        f"{len(study.results)} runs ({len(study.crashed)} crashed) on {machine['cores']} cores of "
        f"{machine['processor']}; torch {machine['torch']}, transformers "
        f"{machine['transformers']}, Python {machine['python']}, {_commits(commits)}. "
        "Brackets hold 95% intervals, from Student's t over seeds and a bootstrap over problems."
    )
    paragraphs = [about, *(conclusion(study, task) for task in tasks)]
    (config.out / "README.md").write_text(markdown(paragraphs, sections), encoding="utf-8")
    for task in tasks:
        first = task == config.tasks[0]
        name = "report.html" if first else f"report_{task}.html"
        _page(
            study, config, task, config.out / name, on_page(paragraphs, sections) if first else []
        )


def make_sections(study: Study, config: StudyConfig, tasks: Sequence[str]) -> list[TableSection]:
    """Make every table that has a row, with its plots; the paper's findings come first."""
    sections = []
    for task in tasks:
        drawn = plots.differences(study, task) | plots.questions(study, task)
        sections.append(TableSection(tables.findings(study, task), drawn))
        sections.append(TableSection(tables.arms(study, config, task), plots.accuracy(study, task)))
        sections.append(TableSection(tables.reached(study, task)))
    for task in tasks[:1]:
        sections.append(
            TableSection(tables.quality(study, config, task), plots.quality(study, config, task))
        )
        sections.append(
            TableSection(tables.sensitivity(study, task), plots.sensitivity(study, task))
        )
        sections.append(TableSection(tables.sketch(study, task), plots.sketch(study, task)))
    sections += [TableSection(tables.cost(study, task), plots.cost(study, task)) for task in tasks]
    sections += [TableSection(tables.sweeps(study, task), folded=True) for task in tasks]
    sections.append(TableSection(tables.crashes(study, config)))
    return [section for section in sections if section.table.rows]


def conclusion(study: Study, task: str) -> str:
    """List the paper's findings by their verdict, those that differ first."""
    judged = [one for one in analysis.judge(study, task) if one.claim.paper]
    sentences = []
    for verdict in (analysis.DIFFERS, analysis.UNDECIDED, analysis.SEEN, analysis.ONE_SEED):
        names = [one.claim.question for one in judged if one.verdict == verdict]
        if names or verdict == analysis.DIFFERS:
            sentences.append(f"{verdict.capitalize()}: {'; '.join(names) or 'nothing'}.")
    return f"On {task}. {' '.join(sentences)}"


def markdown(paragraphs: Sequence[str], sections: Sequence[TableSection]) -> str:
    """Compose README.md: the paragraphs, then the tables, each with links to its plots."""
    lines = ["# Results of the study", *paragraphs]
    for section in sections:
        table = section.table
        body = [table.note] if table.note else []
        body.append(as_markdown(table))
        if section.plots:
            body.append("\n".join(f"![{_words(name)}]({name}.svg)" for name in section.plots))
        if section.folded:
            summary = f"<summary>{escape(table.title)}: {len(table.rows)} settings</summary>"
            lines += ["<details>" + summary, *body, "</details>"]
        else:
            lines += [f"## {table.title}", *body]
    return "\n\n".join(lines) + "\n"


def _commits(names: Sequence[str]) -> str:
    return f"commit{'s' * (len(names) > 1)} {', '.join(names)}" if names else "no known commit"


def _words(name: str) -> str:
    return name.replace("_", " ")


def as_markdown(table: Table) -> str:
    """Write a table of the page in markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns)]
    rows += [[text.replace("|", "\\|") for text, _ in cells] for cells in table.cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def on_page(paragraphs: Sequence[str], sections: Sequence[TableSection]) -> list[Block]:
    """Compose the blocks of the page: the paragraphs, tables and plots of README.md."""
    blocks: list[Block] = [Note(text) for text in paragraphs]
    for section in sections:
        shown: list[Block] = [section.table, *(Figure("", svg) for svg in section.plots.values())]
        blocks += [Folded(section.table.title, shown)] if section.folded else shown
    return blocks


def _page(study: Study, config: StudyConfig, task: str, out: Path, blocks: list[Block]) -> None:
    """Write a page of the runs of PAGED on a task, where their folders still exist.

    Runs are named by their folders inside the study's.
    """
    groups = {
        arm: [trial_folder(config, run.trial) / "run" for run in study.runs(task, arm).values()]
        for arm in PAGED
        if study.runs(task, arm)
    }
    if groups and all(folder.exists() for folders in groups.values() for folder in folders):
        not_drawn = [arm for arm in study.arms(task) if arm not in groups]
        blocks.append(Note(f"Below: the runs of {', '.join(groups)} on {task}. Not drawn step by "
                           f"step: {', '.join(not_drawn)}."))  # fmt: skip
        report.write(groups, out, title=f"KDRL study: {task}", extra=blocks)
        text = out.read_text(encoding="utf-8")
        out.write_text(text.replace(f"{config.out}/", ""), encoding="utf-8")


def again(folder: Path) -> None:
    """Write everything again from a folder's results.json; pages need the folders of the runs."""
    saved = results.load(folder / "results.json")
    write(update(StudyConfig(), saved["config"] | {"out": str(folder)}), saved)


if __name__ == "__main__":
    again(Path(sys.argv[1]))
