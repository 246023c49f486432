"""Tables, plots and page of a study: README.md, *.svg and report.html in its folder."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdrl_train import report
from kdrl_train.report import Figure, Note, Table, charts
from kdrl_train.study import analysis, tables
from kdrl_train.study.analysis import Study
from kdrl_train.study.arms import SCHEDULES
from kdrl_train.study.config import StudyConfig
from kdrl_train.study.statistics import Estimate, smooth
from kdrl_train.study.trial import trial_folder

CURVED = ("grpo", "kd_rkl", "kdrl", "kdrl_annealed", "kdrl_linear", "k1_as_loss")
"""Arms in the plot of training curves: more would not be told apart."""
QUALITIES = ("weak", "middle", "strong")


def write(config: StudyConfig, saved: Mapping[str, Any]) -> None:
    """Everything that can be said so far, from what results.save returned."""
    study = Study(saved["trials"])
    tasks = [task for task in config.tasks if study.arms(task)]
    made = tables.all_tables(study, config, tasks)
    figures = draw(study, config, tasks)
    for name, svg in figures.items():
        charts.save(svg, config.out / f"{name}.svg")
    machine = saved["machine"]
    about = (
        f"{len(study.results)} runs ({len(study.crashed)} crashed) on {machine['cores']} cores of "
        f"{machine['processor']}; torch {machine['torch']}, transformers "
        f"{machine['transformers']}, Python {machine['python']}, commit {machine['commit']}. "
        "In brackets: 95% intervals by bootstrap over seeds and problems."
    )
    (config.out / "README.md").write_text(markdown(about, made, figures), encoding="utf-8")
    groups = {
        f"{task}: {arm}" if len(tasks) > 1 else arm: [
            trial_folder(config, run.trial) / "run" for run in study.runs(task, arm).values()
        ]
        for task in tasks
        for arm in study.arms(task)
        if any(run.curve for run in study.runs(task, arm).values())
    }
    if groups:
        blocks: list[report.Block] = [Note(about), *made]
        blocks += [Figure("", svg) for svg in figures.values()]
        report.write(groups, config.out / "report.html", title="KDRL study", extra=blocks)


def markdown(about: str, made: Sequence[Table], figures: Mapping[str, str]) -> str:
    """README.md: tables, then plots by their file names."""
    parts = ["# Results of the study", about]
    for table in made:
        parts += [f"## {table.title}"]
        parts += [table.note] if table.note else []
        parts += [as_markdown(table)]
    parts += [f"![{name.replace('_', ' ')}]({name}.svg)" for name in figures]
    return "\n\n".join(parts) + "\n"


def as_markdown(table: Table) -> str:
    """A table of the page as markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns)]
    rows += [[text.replace("|", "\\|") for text, _ in cells] for cells in table.cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(study: Study, config: StudyConfig, tasks: Sequence[str]) -> dict[str, str]:
    """File name without suffix -> svg; only plots that have something to show."""
    figures = {}
    for task in tasks:
        points = [_point(arm, study.accuracy(task, arm), i) for i, arm in
                  enumerate(study.arms(task))]  # fmt: skip
        figures[f"accuracy_{task}"] = charts.point_chart(
            points, title=f"{task}: right on the test problems, %", x_label="%"
        )
        lines = [_learning(study, task, arm, i) for i, arm in enumerate(CURVED)
                 if arm in study.arms(task)]  # fmt: skip
        if lines:
            figures[f"learning_{task}"] = charts.line_chart(
                lines,
                title=f"{task}: right among the step's samples, %",
                x_label="sampled tokens, thousands",
            )
    lines = _sensitivity(study, tasks[0]) if tasks else []
    if lines:
        figures["beta"] = charts.line_chart(
            lines, title="validation accuracy by beta, %", x_label="beta", log_x=True
        )
    lines = _quality(study, config, tasks[0]) if tasks else []
    if lines:
        figures["teachers"] = charts.line_chart(
            lines, title="after training, by the teacher's accuracy, %", x_label="teacher, % right"
        )
    return figures


def _point(name: str, found: Estimate | None, look: int) -> charts.Point:
    if found is None:
        return charts.Point(name, None)
    return charts.Point(name, 100 * found.mean, 100 * found.low, 100 * found.high, look)


def _learning(study: Study, task: str, arm: str, look: int) -> charts.Series:
    """Training accuracy over sampled tokens: mean of the seeds, and from the least to the most."""
    runs = [run for run in study.runs(task, arm).values() if run.curve]
    steps = min(len(run.curve["accuracy"]) for run in runs)
    whole = np.array(
        [
            smooth([x or 0.0 for x in run.curve["accuracy"][:steps]], analysis.SMOOTHED_STEPS)
            for run in runs
        ]
    )
    tokens = np.array([[x or 0.0 for x in run.curve["tokens"][:steps]] for run in runs])
    return charts.Series(
        arm,
        (tokens.mean(axis=0).cumsum() / 1000).tolist(),
        (100 * whole.mean(axis=0)).tolist(),
        look=look,
        low=(100 * whole.min(axis=0)).tolist(),
        high=(100 * whole.max(axis=0)).tolist(),
    )


def _sensitivity(study: Study, task: str) -> list[charts.Series]:
    """Validation accuracy of each schedule over beta, at its learning rate of the sweep."""
    lines = []
    for look, arm in enumerate(SCHEDULES):
        found = tables.by_beta(study, task, arm)
        if len(found) > 1:
            known = {beta: e for beta, e in found.items() if e is not None}
            lines.append(
                charts.Series(
                    arm,
                    list(found),
                    [100 * known[b].mean if b in known else None for b in found],
                    look=look,
                )
            )
    return lines


def _quality(study: Study, config: StudyConfig, task: str) -> list[charts.Series]:
    """Accuracy of each arm over that of its teacher."""
    lines = []
    for look, arm in enumerate(config.quality_arms):
        pairs = [
            (study.accuracy(task, "teacher", teacher=t), study.accuracy(task, arm, teacher=t))
            for t in QUALITIES
        ]
        known = sorted((100 * a.mean, b) for a, b in pairs if a is not None and b is not None)
        if len(known) > 1:
            lines.append(
                charts.Series(
                    arm,
                    [x for x, _ in known],
                    [100 * y.mean for _, y in known],
                    look=look,
                    low=[100 * y.low for _, y in known],
                    high=[100 * y.high for _, y in known],
                )
            )
    return lines
