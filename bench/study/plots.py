"""Draws the plots of a study.

Each public function returns SVG texts by file name without suffix, or {} where it has no values.
"""

from collections.abc import Sequence

import numpy as np

from bench.study import analysis, tables
from bench.study.analysis import Study
from bench.study.arms import ARMS, SCHEDULES
from bench.study.config import StudyConfig
from bench.study.statistics import MeanOverSeeds, mean_over_seeds, smooth
from kdrl_train.tools.report import charts
from kdrl_train.tools.report.charts import Point, Reference, Series

QUESTIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "parents": ("KDRL and its parents", "accuracy", ("grpo", "kd_rkl", "kdrl", "kdrl_annealed")),
    "joint": ("joint, shaped, in turn", "accuracy", ("kdrl", "reward_shaping", "opd_then_rl")),
    "estimator": (
        "k2, k3, exact", "accuracy", ("kdrl", "kdrl_k3", "kdrl_exact", "kdrl_centred"),
    ),
    "schedule": ("beta over a run", "accuracy", SCHEDULES),
    "masking": ("masking", "accuracy", ("kdrl", "kdrl_masked", "kdrl_group_masked")),
    "masking_length": (
        "masking", "response_length", ("grpo", "kdrl", "kdrl_masked", "kdrl_group_masked"),
    ),
    "control": ("control", "accuracy", ("grpo", "kdrl", "k1_as_loss")),
}  # fmt: skip
"""Title, metric of the curve and arms of each plot, by name."""
BASIC = {"grpo", "kdrl"}
METRICS = {"accuracy": "% right", "response_length": "tokens of a response"}
NAMED = 184.0
"""Width of the column of questions, in units of the SVG."""
QUALITIES = ("weak", "middle", "strong")


def differences(study: Study, task: str) -> dict[str, str]:
    """Draw every difference of accuracies with its interval, except that of the control.

    The control is far from all others and has a plot of its own.
    """
    judged = [
        one
        for one in analysis.judge(study, task)
        if one.claim.metric == "accuracy" and not ARMS[one.claim.arm].k1_as_loss
    ]
    points = [
        _point(one.claim.question, one.difference, look=0 if one.claim.paper else 1)
        for one in judged
    ]
    svg = charts.point_chart(
        points,
        title=f"{task}: differences",
        x_label="points on the test problems",
        references=[Reference("0", 0.0)],
        named=NAMED,
    )
    return {f"differences_{task}": svg} if points else {}


def accuracy(study: Study, task: str) -> dict[str, str]:
    """Draw the accuracy of every arm on the test problems."""
    points = [_point(arm, study.accuracy(task, arm)) for arm in study.arms(task)]
    title = f"{task}: right on the test problems, %"
    return {f"accuracy_{task}": charts.point_chart(points, title=title, x_label="%")}


def questions(study: Study, task: str) -> dict[str, str]:
    """Draw the training curves of the arms of each question, where one that is not BASIC ran."""
    svgs = {}
    for name, (title, metric, arms) in QUESTIONS.items():
        ran = [arm for arm in arms if any(run.curve for run in study.runs(task, arm).values())]
        if len(ran) > 1 and set(ran) - BASIC:
            lines = [_learning(study, task, arm, arms.index(arm), metric) for arm in ran]
            svgs[f"{name}_{task}"] = charts.line_chart(
                lines,
                title=f"{task}: {title}, {METRICS[metric]}",
                x_label="sampled tokens, thousands",
            )
    return svgs


def cost(study: Study, task: str) -> dict[str, str]:
    """Draw the time of each stage of a step, relative to the rollout.

    The rollout is the same work in all arms, and other load of the machine slows both alike.
    """
    rows = []
    for arm in study.arms(task):
        seconds = study.stage_seconds(task, arm)
        if "rollout" in seconds:
            rows.append((arm, {name: s / seconds["rollout"] for name, s in seconds.items()}))
    svg = charts.stacked_chart(rows, title=f"{task}: cost of a step, rollout = 1", unit="")
    return {f"cost_{task}": svg} if rows else {}


def sketch(study: Study, task: str) -> dict[str, str]:
    """Draw what a coarse sketch changes in accuracy: at the end (dark), and while training."""
    points = []
    for one in analysis.twins(study, task):
        noise = f"{one.entries:.1f} entries, noise {one.noise:.2f}"
        points.append(_point(f"{one.name}: {noise}", mean_over_seeds(one.test)))
        points.append(_point("while training", mean_over_seeds(one.training), look=1))
    svg = charts.point_chart(
        points,
        title=f"{task}: sketched less exact gradient of the head",
        x_label="points on the test problems, and on the training samples",
        references=[Reference("0", 0.0)],
        named=240.0,
    )
    return {f"sketch_{task}": svg} if points else {}


def sensitivity(study: Study, task: str) -> dict[str, str]:
    """Draw the validation accuracy of each schedule over beta, at the sweep's learning rate."""
    lines = []
    for look, arm in enumerate(SCHEDULES):
        accuracies = tables.by_beta(study, task, arm)
        if len(accuracies) > 1:
            y = [None if share is None else 100 * share.mean for share in accuracies.values()]
            lines.append(Series(arm, list(accuracies), y, look=look))
    title = f"{task}: validation, % right, by beta"
    return (
        {"beta": charts.line_chart(lines, title=title, x_label="beta", log_x=True)} if lines else {}
    )


def quality(study: Study, config: StudyConfig, task: str) -> dict[str, str]:
    """Draw the accuracy of each arm over that of its teacher."""
    lines = []
    for look, arm in enumerate(config.quality_arms):
        pairs = [
            (study.accuracy(task, "teacher", teacher=t), study.accuracy(task, arm, teacher=t))
            for t in QUALITIES
        ]
        known = sorted(
            ((100 * a.mean, b) for a, b in pairs if a is not None and b is not None),
            key=lambda pair: pair[0],
        )
        if len(known) > 1:
            y, low, high = ([100 * getattr(e, end) for _, e in known]
                            for end in ("mean", "low", "high"))  # fmt: skip
            lines.append(Series(arm, [x for x, _ in known], y, look, low, high))
    without = study.accuracy(task, "grpo")
    levels = [] if without is None else [Reference("grpo, no teacher", 100 * without.mean)]
    title = f"{task}: % right, by that of the teacher"
    svg = charts.line_chart(lines, title=title, x_label="teacher, % right", references=levels)
    return {"teachers": svg} if lines else {}


def _point(name: str, share: MeanOverSeeds | None, look: int = 0) -> Point:
    if share is None:
        return Point(name, None)
    mean, low, high = (round(100 * value, 1) for value in (share.mean, share.low, share.high))
    return Point(name, mean, low, high, look)


def _learning(study: Study, task: str, arm: str, look: int, metric: str) -> Series:
    """Make the line of a training metric over sampled tokens: mean, lowest and highest seed."""
    runs = [run for run in study.runs(task, arm).values() if run.curve]
    steps = min(len(run.curve[metric]) for run in runs)
    scale = 100.0 if metric == "accuracy" else 1.0
    smoothed = [_smoothed(run.curve[metric][:steps]) for run in runs]
    values = scale * np.array(smoothed)
    tokens = np.array([[x or 0.0 for x in run.curve["tokens"][:steps]] for run in runs])
    return Series(
        arm,
        (tokens.mean(axis=0).cumsum() / 1000).tolist(),
        values.mean(axis=0).tolist(),
        look,
        values.min(axis=0).tolist(),
        values.max(axis=0).tolist(),
    )


def _smoothed(values: Sequence[float | None]) -> list[float]:
    return smooth([value or 0.0 for value in values], analysis.SMOOTHED_STEPS)
