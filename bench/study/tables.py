"""Makes the tables of a study, for the page and for README.md."""

from collections.abc import Sequence
from dataclasses import replace

from bench.study import analysis
from bench.study.analysis import Study
from bench.study.arms import ARMS, SCHEDULES, SKETCH_THRESHOLD
from bench.study.config import RUNOFF_SEED, SWEEP_SEED, StudyConfig, Trial
from bench.study.setup import OUT_OF_DISTRIBUTION
from bench.study.statistics import MeanOverSeeds, mean_over_seeds
from bench.study.trial import STAGES
from kdrl_train.tools.report import Table


def findings(study: Study, task: str) -> Table:
    """Tabulate the paper's findings and further questions, each by a paired difference."""
    judged = analysis.judge(study, task)
    rows = []
    for one in judged:
        claim, shown = one.claim, tokens if one.claim.metric == "length" else points
        scale, digits = (1, 2) if claim.metric == "length" else (100, 1)
        seeds = ", ".join(f"{scale * value:+z.{digits}f}" for value in one.seeds)
        what = f"{claim.arm} - {claim.other}"
        rows.append(
            [claim.question, what, shown(one.difference), seeds, claim.paper or "-", one.verdict]
        )
    return Table(
        f"{task}: the paper's findings, here",
        ["question", "difference", "points (or tokens)", "each seed", "paper", "here"],
        rows,
        "Differences on the test problems, paired by seed and problem. The paper's findings come "
        "first, and among them those that differ here; then come questions that the paper leaves "
        "open. Only the sign can be compared, since models, task and length of training are "
        'different. "Kept" counts as seen where the whole interval is within '
        f"{100 * analysis.MARGIN:g} points of 0. If no two arms differed at all, about "
        f"{len(rows) / 20:.2g} of these {len(rows)} intervals would still exclude 0 by chance; "
        "they are not corrected for that.",
    )


def arms(study: Study, config: StudyConfig, task: str) -> Table:
    """Tabulate every arm at its best settings."""
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
        "Completions of the test problems, sampled at temperature 1. The sets longer and larger "
        "are out of distribution. Tokens: mean length of a completion. Student and teacher are not "
        "trained here: their seeds are draws of one model. *: the value is an end of its sweep, so "
        "a value beyond it may be better. "
        + "; ".join(f"{arm}: {ARMS[arm].title}" for arm in study.arms(task))
        + ".",
    )


def _settings(study: Study, trial: Trial) -> list[str]:
    """Write learning rate and beta, with a star where the value is an end of its sweep."""
    arm = ARMS[trial.arm].like or trial.arm
    sweep = [r.trial for r in study.swept if (r.trial.task, r.trial.arm) == (trial.task, arm)]
    texts = []
    for value, tried in (
        (trial.learning_rate, {t.learning_rate for t in sweep}),
        (trial.beta, {t.beta for t in sweep}),
    ):
        swept = [value_tried for value_tried in tried if value_tried is not None]
        edge = len(swept) > 1 and value in (min(swept), max(swept))
        texts.append("-" if value is None else f"{value:g}{'*' * edge}")
    return texts


def levels(study: Study, task: str) -> dict[str, float]:
    """Return the accuracies to be reached: the teacher's, and half way from the student's to it.

    The half way is left out where the student is at least as good as the teacher.
    """
    student, teacher = study.accuracy(task, "student"), study.accuracy(task, "teacher")
    if teacher is None:
        return {}
    if student is None or student.mean >= teacher.mean:
        return {"teacher": teacher.mean}
    return {"half way": (student.mean + teacher.mean) / 2, "teacher": teacher.mean}


def reached(study: Study, task: str) -> Table:
    """Tabulate the tokens that each run sampled until it reached an accuracy."""
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
        "Thousands of tokens, one number a seed, until that share of a run's training samples is "
        f"right, in the mean over {analysis.SMOOTHED_STEPS} steps. Half way is the middle between "
        "student and teacher on the test problems. A run draws each prompt once, but student and "
        "teacher have learnt from these problems, with imperfect solutions, in their supervised "
        "training. sft samples from the teacher and has no curve.",
    )


def quality(study: Study, config: StudyConfig, task: str) -> Table:
    """Tabulate the arms that ran with teachers of three qualities."""
    rows = []
    for teacher in ("weak", "middle", "strong"):
        teacher_accuracy = study.accuracy(task, "teacher", teacher=teacher)
        learnt = [study.accuracy(task, arm, teacher=teacher) for arm in config.quality_arms]
        if teacher_accuracy is not None and any(learnt):
            rows.append([teacher, percent(teacher_accuracy), *map(percent, learnt)])
    without = study.accuracy(task, "grpo")
    return Table(
        f"{task}: teachers",
        ["teacher", "teacher's avg@k %", *config.quality_arms],
        rows if len(rows) > 1 else [],
        f"Without a teacher (grpo): {percent(without)}. Learning rate and beta are those chosen "
        "with the middle teacher.",
    )


def by_beta(study: Study, task: str, arm: str) -> dict[float, MeanOverSeeds | None]:
    """Return the validation accuracy of each beta, at the learning rate that all betas share."""
    points = analysis.sweep_points(study, task).items()
    first_runs = {t: e for t, e in points if t.arm == arm and t.seed == SWEEP_SEED}
    counts: dict[float | None, int] = {}
    for trial in first_runs:
        counts[trial.learning_rate] = counts.get(trial.learning_rate, 0) + 1
    if not counts:
        return {}
    rate = max(counts, key=counts.__getitem__)
    pairs = [(t.beta, e) for t, e in first_runs.items() if t.learning_rate == rate and t.beta]
    return {beta: e for beta, e in sorted(pairs, key=lambda pair: pair[0] or 0.0) if beta}


def sketch(study: Study, task: str) -> Table:
    """Tabulate what a coarse sketch of the head's gradient changes."""
    rows = [
        [
            one.name,
            points(mean_over_seeds(one.test)),
            ", ".join(f"{100 * value:+z.1f}" for value in one.test.mean(axis=1)),
            points(mean_over_seeds(one.training)),
            f"{one.entries:.1f}",
            f"{one.noise:.2f}",
        ]
        for one in analysis.twins(study, task)
    ]
    return Table(
        f"{task}: a sketch of the head's gradient, less the exact one",
        ["arm", "test, points", "each seed", "training, points", "entries a token", "noise"],
        rows,
        "Differences of avg@k at the same learning rate, beta and seeds, where model.head_backward "
        f"is sketch and exact. The sketch is coarse: threshold {SKETCH_THRESHOLD:g}, in every row. "
        "Test: the model at the end, on the test problems. Training: the samples of all steps. "
        "Entries: kept of a token's dL/dlogits. Noise: sketch_noise, the relative error to expect "
        "of the gradient of hidden states. Both are means over steps and seeds.",
    )


def sensitivity(study: Study, task: str) -> Table:
    """Tabulate the accuracy of each schedule over beta."""
    accuracies = {arm: by_beta(study, task, arm) for arm in SCHEDULES}
    betas = sorted({beta for one in accuracies.values() for beta in one})
    rows = [
        [arm, *(_tried(one[beta]) if beta in one else "-" for beta in betas)]
        for arm, one in accuracies.items()
        if len(one) > 1
    ]
    return Table(
        f"{task}: schedule and beta",
        ["arm", *(f"beta {beta:g}" for beta in betas)],
        rows,
        "avg@k % on the validation problems at the arm's best learning rate, one run each. The "
        "intervals are over problems alone; another seed changes a run as well.",
    )


def cost(study: Study, task: str) -> Table:
    """Tabulate the seconds of a step by stage."""
    rows = []
    for arm in study.arms(task):
        seconds = study.stage_seconds(task, arm)
        if seconds:
            cells = [f"{seconds[stage]:.3f}" if stage in seconds else "-" for stage in STAGES]
            total = sum(seconds.values())
            share = f"{total / seconds['rollout']:.2f}" if "rollout" in seconds else "-"
            rows.append([arm, *cells, f"{total:.3f}", share])
    return Table(
        f"{task}: seconds of a step",
        ["arm", *STAGES, "sum", "sum / rollout"],
        rows,
        "Medians over steps and seeds, times the share of steps that have the stage, with several "
        "runs at the same time. The arms ran at different hours, and their seconds hold whatever "
        "else the machine did. The last column hardly does, since a rollout is the same work in "
        "all arms while completions are equally long. update: the policy's backbone, forward and "
        "backward, and both heads with the loss, which one call computes; `python -m bench` "
        "measures the head alone. teacher: its backbone, and for reward_shaping, which needs "
        "log-probabilities before the update, its head too.",
    )


def sweeps(study: Study, task: str) -> Table:
    """Tabulate the runs of the sweeps; those of more_betas are among them, and chose nothing."""
    accuracies = analysis.sweep_points(study, task)
    rows = []
    for trial, accuracy in accuracies.items():
        if trial.seed == SWEEP_SEED:
            second_run = replace(trial, seed=RUNOFF_SEED)
            rows.append(
                [
                    trial.arm,
                    f"{trial.learning_rate:g}",
                    "-" if trial.beta is None else f"{trial.beta:g}",
                    _tried(accuracy),
                    _tried(accuracies[second_run]) if second_run in accuracies else "-",
                ]
            )
    columns = ["arm", "learning rate", "beta", "validation avg@k %", "again, another seed"]
    return Table(f"{task}: sweeps", columns, rows)


def crashes(study: Study, config: StudyConfig) -> Table:
    """Tabulate the runs that crashed, with their errors."""
    rows = [
        [r.trial.name, (r.error or "").replace("\n", " ").replace(f"{config.out}/", "")[:300]]
        for r in study.crashed
    ]
    return Table("Runs that crashed", ["run", "error"], rows)


def percent(share: MeanOverSeeds | None) -> str:
    """Write a share with its interval, in percent."""
    if share is None:
        return "-"
    return f"{100 * share.mean:z.1f} ({100 * share.low:z.1f}-{100 * share.high:z.1f})"


def _tried(accuracy: MeanOverSeeds | None) -> str:
    """Write the accuracy of a run of a sweep, or that it crashed."""
    return "crashed" if accuracy is None else percent(accuracy)


def points(difference: MeanOverSeeds | None) -> str:
    """Write a difference of shares with its interval, in percentage points."""
    if difference is None:
        return "-"
    mean, low, high = (100 * x for x in (difference.mean, difference.low, difference.high))
    return f"{mean:+z.1f} ({low:+z.1f} to {high:+z.1f})"


def tokens(difference: MeanOverSeeds) -> str:
    """Write a difference of lengths with its interval, which needs two pairs of runs."""
    if difference.seeds < 2:
        return f"{difference.mean:+z.2f} tokens"
    return f"{difference.mean:+z.2f} ({difference.low:+z.2f} to {difference.high:+z.2f}) tokens"


def _reached(tokens_of_runs: list[int | None]) -> str:
    return ", ".join("never" if n is None else f"{n / 1000:.0f}" for n in tokens_of_runs) or "-"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
