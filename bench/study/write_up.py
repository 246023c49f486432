"""Tables, plots and pages of a study: README.md, *.svg and report*.html in its folder.

`python -m bench.study.write_up FOLDER` writes them again, out of its results.json.
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
"""Arms whose runs are drawn step by step on the pages: more would not be told apart."""


@dataclass(frozen=True, slots=True)
class Part:
    """A table with its plots."""

    table: Table
    plots: Mapping[str, str] = field(default_factory=dict)
    """File name without suffix -> svg."""
    folded: bool = False
    """Long, and seldom read."""


def write(config: StudyConfig, saved: Mapping[str, Any]) -> None:
    """Everything that can be said so far, from what results.save returned."""
    study = Study(saved["trials"])
    tasks = [task for task in config.tasks if study.arms(task)]
    made = parts(study, config, tasks)
    for part in made:
        for name, svg in part.plots.items():
            charts.save(svg, config.out / f"{name}.svg")
    machine = saved["machine"]
    commits = sorted({run.commit for run in study.results if run.commit})
    about = (
        f"{len(study.results)} runs ({len(study.crashed)} crashed) on {machine['cores']} cores of "
        f"{machine['processor']}; torch {machine['torch']}, transformers "
        f"{machine['transformers']}, Python {machine['python']}, {_commits(commits)}. "
        "In brackets: 95% intervals, from Student's t over seeds and a bootstrap over problems."
    )
    said = [about, *(conclusion(study, task) for task in tasks)]
    (config.out / "README.md").write_text(markdown(said, made), encoding="utf-8")
    for task in tasks:
        first = task == config.tasks[0]
        name = "report.html" if first else f"report_{task}.html"
        _page(study, config, task, config.out / name, on_page(said, made) if first else [])


def parts(study: Study, config: StudyConfig, tasks: Sequence[str]) -> list[Part]:
    """Every table that has a row, with its plots; what differs from the paper first."""
    found = []
    for task in tasks:
        drawn = plots.differences(study, task) | plots.questions(study, task)
        found.append(Part(tables.findings(study, task), drawn))
        found.append(Part(tables.arms(study, config, task), plots.accuracy(study, task)))
        found.append(Part(tables.reached(study, task)))
    for task in tasks[:1]:
        found.append(Part(tables.quality(study, config, task), plots.quality(study, config, task)))
        found.append(Part(tables.sensitivity(study, task), plots.sensitivity(study, task)))
    found += [Part(tables.cost(study, task), plots.cost(study, task)) for task in tasks]
    found += [Part(tables.sweeps(study, task), folded=True) for task in tasks]
    found.append(Part(tables.crashes(study, config)))
    return [part for part in found if part.table.rows]


def conclusion(study: Study, task: str) -> str:
    """The paper's findings by what became of them, those that differ first."""
    judged = [one for one in analysis.judge(study, task) if one.finding.paper]
    said = []
    for verdict in (analysis.DIFFERS, analysis.UNDECIDED, analysis.SEEN, analysis.ONE_SEED):
        names = [one.finding.question for one in judged if one.verdict == verdict]
        if names or verdict == analysis.DIFFERS:
            said.append(f"{verdict.capitalize()}: {'; '.join(names) or 'nothing'}.")
    return f"On {task}. {' '.join(said)}"


def markdown(said: Sequence[str], made: Sequence[Part]) -> str:
    """README.md: tables, each with its plots by their file names."""
    lines = ["# Results of the study", *said]
    for part in made:
        table = part.table
        body = [table.note] if table.note else []
        body.append(as_markdown(table))
        if part.plots:
            body.append("\n".join(f"![{_words(name)}]({name}.svg)" for name in part.plots))
        if part.folded:
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
    """A table of the page as markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns)]
    rows += [[text.replace("|", "\\|") for text, _ in cells] for cells in table.cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def on_page(said: Sequence[str], made: Sequence[Part]) -> list[Block]:
    """The same as blocks of a page; the cells' intervals below their values."""
    blocks: list[Block] = [Note(text) for text in said]
    for part in made:
        shown: list[Block] = [part.table, *(Figure("", svg) for svg in part.plots.values())]
        blocks += [Folded(part.table.title, shown)] if part.folded else shown
    return blocks


def _page(study: Study, config: StudyConfig, task: str, out: Path, blocks: list[Block]) -> None:
    """A page of the runs of PAGED on a task, where their folders still are; they are named as they
    lie in the study's."""
    groups = {
        arm: [trial_folder(config, run.trial) / "run" for run in study.runs(task, arm).values()]
        for arm in PAGED
        if study.runs(task, arm)
    }
    if groups and all(folder.exists() for folders in groups.values() for folder in folders):
        left = [arm for arm in study.arms(task) if arm not in groups]
        blocks.append(Note(f"Below: the runs of {', '.join(groups)} on {task}. Not drawn step by "
                           f"step: {', '.join(left)}."))  # fmt: skip
        report.write(groups, out, title=f"KDRL study: {task}", extra=blocks)
        text = out.read_text(encoding="utf-8")
        out.write_text(text.replace(f"{config.out}/", ""), encoding="utf-8")


def again(folder: Path) -> None:
    """Write everything out of a folder's results.json; pages only where the runs are there too."""
    saved = results.load(folder / "results.json")
    write(update(StudyConfig(), saved["config"] | {"out": str(folder)}), saved)


if __name__ == "__main__":
    again(Path(sys.argv[1]))
