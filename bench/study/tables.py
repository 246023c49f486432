"""The tables of a study, for the page and for README.md."""

from collections.abc import Sequence
from dataclasses import replace

from bench.study import analysis
from bench.study.analysis import Study
from bench.study.arms import ARMS, SCHEDULES
from bench.study.config import RUNOFF_SEED, SWEEP_SEED, StudyConfig, Trial
from bench.study.setup import OUT_OF_DISTRIBUTION
from bench.study.statistics import Estimate
from bench.study.trial import STAGES
from kdrl_train.tools.report import Table


def findings(study: Study, task: str) -> Table:
    """The paper's findings and further questions, each by a paired difference."""
    judged = analysis.judge(study, task)
    rows = []
    for one in judged:
        finding, shown = one.finding, tokens if one.finding.metric == "length" else points
        scale, digits = (1, 2) if finding.metric == "length" else (100, 1)
        seeds = ", ".join(f"{scale * value:+z.{digits}f}" for value in one.seeds)
        what = f"{finding.arm} - {finding.other}"
        rows.append(
            [finding.question, what, shown(one.found), seeds, finding.paper or "-", one.verdict]
        )
    return Table(
        f"{task}: the paper's findings, here",
        ["question", "difference", "points (or tokens)", "each seed", "paper", "here"],
        rows,
        "On the test problems, paired by seed and problem. First the paper's findings, those that "
        "differ here before the others; then questions that it leaves open. Only the sign can be "
        'compared: models, task and length of training are others. "Kept" is seen where the whole '
        f"interval is within {100 * analysis.MARGIN:g} points of 0. Of {len(rows)} differences at "
        f"95% about {len(rows) / 20:.2g} would be decided by chance alone where there "
        "were none; the intervals are not corrected for that.",
    )


def arms(study: Study, config: StudyConfig, task: str) -> Table:
    """Every arm at its best settings."""
    k = config.samples
    rows = []
    for arm in study.arms(task):
        runs = list(study.runs(task, arm).values())
        scores = [run.scores["test"] for run in runs]
        against = None if arm == "grpo" else study.difference(task, arm, "grpo")
        majorities = [s.maj_at_k for s in scores if s.maj_at_k is not None]
        rows.append(
            [
                arm,
                *_settings(study, runs[0].trial),
                str(len(runs)),
                percent(study.accuracy(task, arm)),
                points(against),
                f"{100 * _mean([s.pass_at_k for s in scores]):.1f}",
                f"{100 * _mean(majorities):.1f}" if majorities else "-",
                *(percent(study.accuracy(task, arm, name)) for name in OUT_OF_DISTRIBUTION),
                f"{_mean([s.length for s in scores]):.1f}",
            ]
        )
    columns = ["arm", "learning rate", "beta", "seeds", f"avg@{k} %", "less GRPO, points"]
    columns += [f"pass@{k} %", f"maj@{k} %", *(f"{name} %" for name in OUT_OF_DISTRIBUTION)]
    return Table(
        f"{task}: arms",
        [*columns, "tokens"],
        rows,
        "Sampled at temperature 1 on the test problems; longer and larger: out of distribution; "
        "tokens: of a completion. Of student and teacher, which are not trained here, seeds are "
        "draws of one model. *: an end of what was swept, so that a value beyond it may be better. "
        + "; ".join(f"{arm}: {ARMS[arm].title}" for arm in study.arms(task))
        + ".",
    )


def _settings(study: Study, trial: Trial) -> list[str]:
    """Learning rate and beta, those at an end of their sweep with a star."""
    arm = ARMS[trial.arm].like or trial.arm
    sweep = [r.trial for r in study.swept if (r.trial.task, r.trial.arm) == (trial.task, arm)]
    found = []
    for value, tried in (
        (trial.learning_rate, {t.learning_rate for t in sweep}),
        (trial.beta, {t.beta for t in sweep}),
    ):
        swept = [one for one in tried if one is not None]
        edge = len(swept) > 1 and value in (min(swept), max(swept))
        found.append("-" if value is None else f"{value:g}{'*' * edge}")
    return found


def levels(study: Study, task: str) -> dict[str, float]:
    """Accuracies that are waited for: half way from the student's to the teacher's, the teacher's;
    those below what is measured before training are left out."""
    student, teacher = study.accuracy(task, "student"), study.accuracy(task, "teacher")
    if teacher is None:
        return {}
    if student is None or student.mean >= teacher.mean:
        return {"teacher": teacher.mean}
    return {"half way": (student.mean + teacher.mean) / 2, "teacher": teacher.mean}


def reached(study: Study, task: str) -> Table:
    """Sampled tokens until an accuracy."""
    goals = levels(study, task)
    rows = []
    for arm in study.arms(task):
        runs = [run for run in study.runs(task, arm).values() if run.sampled_tokens]
        if runs:
            sampled = _mean([run.sampled_tokens for run in runs]) / 1000
            cells = [_reached(study.tokens_to(task, arm, goal)) for goal in goals.values()]
            rows.append([arm, f"{sampled:.0f}", *cells])
    return Table(
        f"{task}: sampled tokens until an accuracy",
        ["arm", "sampled in all", *(f"{name}: {100 * v:.1f}%" for name, v in goals.items())],
        rows if goals else [],
        "Thousands of tokens, a number a seed, until the samples that a run trains on are as often "
        f"right, in the mean of {analysis.SMOOTHED_STEPS} steps. Half way: between student and "
        "teacher on the test problems. A run draws each prompt once, but student and teacher had "
        "seen these problems, with solutions as imperfect as they are, in their supervised "
        "training. sft samples from the teacher and has no curve.",
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
    points = analysis.sweep_points(study, task).items()
    found = {t: e for t, e in points if t.arm == arm and t.seed == SWEEP_SEED}
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
        [arm, *(_tried(one[beta]) if beta in one else "-" for beta in betas)]
        for arm, one in found.items()
        if len(one) > 1
    ]
    return Table(
        f"{task}: schedule and beta",
        ["arm", *(f"beta {beta:g}" for beta in betas)],
        rows,
        "avg@k % on the validation problems at the arm's best learning rate, one run each: the "
        "intervals are over problems alone, and another seed moves a run too.",
    )


def cost(study: Study, task: str) -> Table:
    """Seconds of a step by stage."""
    rows = []
    for arm in study.arms(task):
        found = study.stage_seconds(task, arm)
        if found:
            cells = [f"{found[stage]:.3f}" if stage in found else "-" for stage in STAGES]
            total = sum(found.values())
            share = f"{total / found['rollout']:.2f}" if "rollout" in found else "-"
            rows.append([arm, *cells, f"{total:.3f}", share])
    return Table(
        f"{task}: seconds of a step",
        ["arm", *STAGES, "sum", "sum / rollout"],
        rows,
        "Medians over steps and seeds, times the share of steps that have the stage; several runs "
        "at a time. Arms ran at other hours, and seconds tell what else the machine did then; the "
        "last column does not: a rollout is the same work in all arms, as long as completions are. "
        "update holds both heads with the loss, which one call computes in one pass, and the "
        "policy's backbone, forward and backward: a run cannot tell the head apart, `python -m "
        "bench` does. teacher: its backbone (of reward_shaping, which needs log-probabilities "
        "before the update, its head too).",
    )


def sweeps(study: Study, task: str) -> Table:
    """What was tried on the validation problems; more_betas are among it, and chose nothing."""
    found = analysis.sweep_points(study, task)
    rows = []
    for trial, first in found.items():
        if trial.seed == SWEEP_SEED:
            again = replace(trial, seed=RUNOFF_SEED)
            rows.append(
                [
                    trial.arm,
                    f"{trial.learning_rate:g}",
                    "-" if trial.beta is None else f"{trial.beta:g}",
                    _tried(first),
                    _tried(found[again]) if again in found else "-",
                ]
            )
    columns = ["arm", "learning rate", "beta", "validation avg@k %", "again, another seed"]
    return Table(f"{task}: sweeps", columns, rows)


def crashes(study: Study, config: StudyConfig) -> Table:
    """Runs without a measurement, and why."""
    rows = [
        [r.trial.name, (r.error or "").replace("\n", " ").replace(f"{config.out}/", "")[:300]]
        for r in study.crashed
    ]
    return Table("Runs that crashed", ["run", "error"], rows)


def percent(found: Estimate | None) -> str:
    """Of a share, with its interval."""
    if found is None:
        return "-"
    return f"{100 * found.mean:z.1f} ({100 * found.low:z.1f}-{100 * found.high:z.1f})"


def _tried(found: Estimate | None) -> str:
    """Of a run of a sweep."""
    return "crashed" if found is None else percent(found)


def points(found: Estimate | None) -> str:
    """Of a difference of shares, with its interval, in percentage points."""
    if found is None:
        return "-"
    return f"{100 * found.mean:+z.1f} ({100 * found.low:+z.1f} to {100 * found.high:+z.1f})"


def tokens(found: Estimate) -> str:
    """Of a difference of lengths, with its interval; one run of each has none."""
    if found.seeds < 2:
        return f"{found.mean:+z.2f} tokens"
    return f"{found.mean:+z.2f} ({found.low:+z.2f} to {found.high:+z.2f}) tokens"


def _reached(found: list[int | None]) -> str:
    return ", ".join("never" if n is None else f"{n / 1000:.0f}" for n in found) or "-"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
