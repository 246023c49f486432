"""The tables of a study, for the page and for README.md."""

from collections.abc import Sequence

from kdrl_train.report import Table
from kdrl_train.study import analysis
from kdrl_train.study.analysis import FINDINGS, Study
from kdrl_train.study.arms import ARMS, SCHEDULES
from kdrl_train.study.config import StudyConfig
from kdrl_train.study.lab import OUT_OF_DISTRIBUTION
from kdrl_train.study.statistics import Estimate
from kdrl_train.study.trial import STAGES


def all_tables(study: Study, config: StudyConfig, tasks: Sequence[str]) -> list[Table]:
    """Every table that has a row; the findings first, and what differs from the paper first."""
    found = [findings(study, task) for task in tasks]
    found += [arms(study, config, task) for task in tasks]
    if tasks:
        found += [quality(study, config, tasks[0]), sensitivity(study, tasks[0])]
    found += [cost(study, task) for task in tasks]
    found += [sweeps(study, task) for task in tasks]
    found.append(crashes(study))
    return [table for table in found if table.rows]


def findings(study: Study, task: str) -> Table:
    """The paper's findings and further questions, each by a paired difference."""
    rows = []
    for one in FINDINGS:
        found = study.difference(task, one.arm, one.other, one.metric)
        if found is not None:
            shown = tokens(found) if one.metric == "length" else points(found)
            judged = analysis.verdict(one, found)
            rows.append([one.question, f"{one.arm} - {one.other}", shown, one.paper or "-", judged])
    places = analysis.order([row[-1] for row in rows])
    return Table(
        f"{task}: the paper's findings, here",
        ["question", "difference", "points (or tokens) on the test problems", "paper", "here"],
        [rows[place] for place in places],
        "Paired by seed and problem. What differs from the paper stands first. Only the sign can "
        "be compared: models, task and length of training are others.",
    )


def arms(study: Study, config: StudyConfig, task: str) -> Table:
    """Every arm at its best settings."""
    k = config.samples
    teacher = study.accuracy(task, "teacher")
    level = teacher.mean if teacher is not None else 0.5
    rows = []
    for arm in study.arms(task):
        runs = list(study.runs(task, arm).values())
        trial, scores = runs[0].trial, [run.scores["test"] for run in runs]
        against = None if arm == "grpo" else study.difference(task, arm, "grpo")
        majorities = [s.maj_at_k for s in scores if s.maj_at_k is not None]
        rows.append(
            [
                arm,
                "-" if trial.learning_rate is None else f"{trial.learning_rate:g}",
                "-" if trial.beta is None else f"{trial.beta:g}",
                str(len(runs)),
                percent(study.accuracy(task, arm)),
                points(against),
                f"{100 * _mean([s.pass_at_k for s in scores]):.1f}",
                f"{100 * _mean(majorities):.1f}" if majorities else "-",
                *(percent(study.accuracy(task, arm, name)) for name in OUT_OF_DISTRIBUTION),
                f"{_mean([s.length for s in scores]):.1f}",
                _reached(study.tokens_to(task, arm, level)),
            ]
        )
    columns = ["arm", "learning rate", "beta", "seeds", f"avg@{k} %", "less GRPO, points"]
    columns += [f"pass@{k} %", f"maj@{k} %", *(f"{name} %" for name in OUT_OF_DISTRIBUTION)]
    return Table(
        f"{task}: arms",
        [*columns, "tokens", "sampled until teacher"],
        rows,
        f"Sampled at temperature 1. Last column: thousands of sampled tokens until the training "
        f"samples are as often right as the teacher's ({100 * level:.1f}%), a number a seed. "
        + "; ".join(f"{arm}: {ARMS[arm].title}" for arm in study.arms(task))
        + ".",
    )


def quality(study: Study, config: StudyConfig, task: str) -> Table:
    """Teachers of three qualities."""
    rows = []
    for teacher in ("weak", "middle", "strong"):
        own = study.accuracy(task, "teacher", teacher=teacher)
        learnt = [study.accuracy(task, arm, teacher=teacher) for arm in config.quality_arms]
        if own is not None and any(learnt):
            rows.append([teacher, percent(own), *map(percent, learnt)])
    without = study.accuracy(task, "grpo")
    return Table(
        f"{task}: teachers",
        ["teacher", "its own avg@k %", *config.quality_arms],
        rows if len(rows) > 1 else [],
        f"Without a teacher (grpo): {percent(without)}. Learning rate and beta are those chosen "
        "with the middle teacher.",
    )


def by_beta(study: Study, task: str, arm: str) -> dict[float, Estimate | None]:
    """Beta -> validation accuracy at the learning rate that all betas were tried at."""
    found = {t: e for t, e in analysis.sweep_points(study, task).items() if t.arm == arm}
    counts: dict[float | None, int] = {}
    for trial in found:
        counts[trial.learning_rate] = counts.get(trial.learning_rate, 0) + 1
    if not counts:
        return {}
    rate = max(counts, key=counts.__getitem__)
    pairs = [(t.beta, e) for t, e in found.items() if t.learning_rate == rate and t.beta]
    return {beta: e for beta, e in sorted(pairs, key=lambda pair: pair[0] or 0.0) if beta}


def sensitivity(study: Study, task: str) -> Table:
    """Accuracy over beta, of each schedule."""
    found = {arm: by_beta(study, task, arm) for arm in SCHEDULES}
    betas = sorted({beta for one in found.values() for beta in one})
    rows = [
        [arm, *(percent(one[beta]) if beta in one else "-" for beta in betas)]
        for arm, one in found.items()
        if len(one) > 1
    ]
    return Table(
        f"{task}: schedule and beta",
        ["arm", *(f"beta {beta:g}" for beta in betas)],
        rows,
        "avg@k % on the validation problems, one run each, at the arm's best learning rate.",
    )


def cost(study: Study, task: str) -> Table:
    """Seconds of a step by stage."""
    rows = []
    for arm in study.arms(task):
        found = study.stage_seconds(task, arm)
        if found:
            cells = [f"{found[stage]:.3f}" if stage in found else "-" for stage in STAGES]
            rows.append([arm, *cells, f"{sum(found.values()):.3f}"])
    return Table(
        f"{task}: seconds of a step",
        ["arm", *STAGES, "all"],
        rows,
        "Medians over steps and seeds, one CPU thread a run, several runs at a time: compare "
        "within the table. update holds the head, with its loss, and the backbone's two passes.",
    )


def sweeps(study: Study, task: str) -> Table:
    """All runs that settings were chosen by."""
    rows = [
        [t.arm, f"{t.learning_rate:g}", "-" if t.beta is None else f"{t.beta:g}",
         "crashed" if e is None else percent(e)]
        for t, e in analysis.sweep_points(study, task).items()
    ]  # fmt: skip
    return Table(f"{task}: sweeps", ["arm", "learning rate", "beta", "validation avg@k %"], rows)


def crashes(study: Study) -> Table:
    """Runs without a measurement, and why."""
    rows = [[r.trial.name, (r.error or "").replace("\n", " ")[:300]] for r in study.crashed]
    return Table("Runs that crashed", ["run", "error"], rows)


def percent(found: Estimate | None) -> str:
    """Of a share, with its interval."""
    if found is None:
        return "-"
    return f"{100 * found.mean:.1f} ({100 * found.low:.1f}-{100 * found.high:.1f})"


def points(found: Estimate | None) -> str:
    """Of a difference of shares, with its interval, in percentage points."""
    if found is None:
        return "-"
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def tokens(found: Estimate) -> str:
    """Of a difference of lengths, with its interval."""
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f}) tokens"


def _reached(found: list[int | None]) -> str:
    if not any(found):
        return "-"
    return ", ".join("never" if n is None else f"{n / 1000:.0f}" for n in found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
