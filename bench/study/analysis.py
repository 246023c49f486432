"""What the runs of a study say: means with intervals, paired differences, the paper's findings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.study.config import Trial
from bench.study.statistics import Estimate, estimate, first_reached, smooth
from bench.study.trial import STAGES, Result

MARGIN = 0.02
"""Share of right completions within which two arms count as alike. That an interval holds 0 does
not show it: a wide one holds it always."""
SMOOTHED_STEPS = 10
"""Steps whose training samples say when an accuracy is reached."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A statement about two arms, and what the paper (arXiv 2506.02208) found."""

    question: str
    arm: str
    other: str
    paper: str
    """Empty: the paper does not say."""
    metric: Literal["accuracy", "length"] = "accuracy"
    expected: Literal[1, 0, -1] = 1
    """Sign of arm less other in the paper; 0: no difference beyond MARGIN."""


DIFFERS, UNDECIDED, SEEN = "differs from the paper", "not decided here", "as in the paper"
ONE_SEED = "one seed: not judged"

FINDINGS = (
    Finding("KDRL against GRPO", "kdrl", "grpo", "56.8 against 54.6"),
    Finding("KDRL against distillation", "kdrl", "kd_rkl", "56.8 against 56.1"),
    Finding("distillation against GRPO", "kd_rkl", "grpo", "56.1 against 54.6"),
    Finding("annealed against constant", "kdrl_annealed", "kdrl", "57.2 against 56.8"),
    Finding("annealed against GRPO", "kdrl_annealed", "grpo", "57.2 against 54.6"),
    Finding("k2 against k3", "kdrl", "kdrl_k3", "about 1.4 points more"),
    Finding("joint loss against shaping", "kdrl", "reward_shaping", "steady, where it collapses"),
    Finding("masking: accuracy", "kdrl_masked", "kdrl", "kept", expected=0),
    Finding(
        "masking: length", "kdrl_masked", "kdrl", "1,400 tokens shorter", "length", expected=-1
    ),
    Finding("group mask: accuracy", "kdrl_group_masked", "kdrl", ""),
    Finding("exact KL against k2, in KDRL", "kdrl_exact", "kdrl", ""),
    Finding("exact KL against k2, alone", "kd_rkl_exact", "kd_rkl", ""),
    Finding("centred k2 against k2", "kdrl_centred", "kdrl", ""),
    Finding("distil then RL against joint", "opd_then_rl", "kdrl", ""),
    Finding("SFT against distillation", "sft", "kd_rkl", ""),
    Finding("KDRL against SFT", "kdrl", "sft", ""),
    Finding("linear to 0 against constant", "kdrl_linear", "kdrl", ""),
    Finding("cosine to 0 against constant", "kdrl_cosine", "kdrl", ""),
    Finding("three steps against constant", "kdrl_step", "kdrl", ""),
    Finding("4p(1 - p) against constant", "kdrl_adaptive", "kdrl", ""),
    Finding("k1 as a loss against GRPO", "k1_as_loss", "grpo", ""),
)


class Study:
    """The results of one study, by what they are of.

    Args:
        results: of all runs; those of a sweep and those that crashed are kept apart.
    """

    def __init__(self, results: Iterable[Result]) -> None:
        self.results = list(results)
        self.crashed = [r for r in self.results if r.status == "crashed"]
        self.swept = [r for r in self.results if r.trial.sweep]
        self._final: dict[tuple[str, str, str], dict[int, Result]] = {}
        for result in self.results:
            trial = result.trial
            if not trial.sweep and result.status == "done":
                key = (trial.task, trial.arm, trial.teacher)
                self._final.setdefault(key, {})[trial.seed] = result

    def arms(self, task: str) -> list[str]:
        """Arms with a run that is reported, in the order of the runs."""
        return [arm for t, arm, teacher in self._final if t == task and teacher == "middle"]

    def runs(self, task: str, arm: str, teacher: str = "middle") -> dict[int, Result]:
        """Seed -> run that ended and is reported."""
        return self._final.get((task, arm, teacher), {})

    def accuracy(
        self, task: str, arm: str, name: str = "test", teacher: str = "middle"
    ) -> Estimate | None:
        """Mean share of right completions on a set of problems; None without a run."""
        runs = self.runs(task, arm, teacher)
        if not runs:
            return None
        return estimate(np.stack([run.scores[name].shares for run in runs.values()]))

    def pairs(self, task: str, arm: str, other: str, metric: str = "accuracy") -> np.ndarray | None:
        """[S, P] arm less other, of the seeds that both have: share of right completions of each
        test problem, or, with P = 1, length in tokens. None where they share no seed."""
        ours, theirs = self.runs(task, arm), self.runs(task, other)
        both = [
            (ours[seed].scores["test"], theirs[seed].scores["test"])
            for seed in sorted(ours.keys() & theirs.keys())
        ]
        if not both:
            return None
        if metric == "length":
            return np.array([[a.length - b.length] for a, b in both])
        return np.stack([a.shares - b.shares for a, b in both])

    def difference(
        self, task: str, arm: str, other: str, metric: str = "accuracy"
    ) -> Estimate | None:
        """The mean of `pairs`, with its interval."""
        pairs = self.pairs(task, arm, other, metric)
        return None if pairs is None else estimate(pairs)

    def tokens_to(self, task: str, arm: str, level: float) -> list[int | None]:
        """Of each run with a curve: sampled tokens until its training samples are right at least
        this often, in the mean over SMOOTHED_STEPS steps; None: never. Each prompt is drawn once in
        a run, but was among the problems that student and teacher learnt from supervised."""
        found: list[int | None] = []
        for run in self.runs(task, arm).values():
            if not run.curve:
                continue
            right = [value or 0.0 for value in run.curve["accuracy"]]
            tokens = np.cumsum([value or 0.0 for value in run.curve["tokens"]])
            whole = smooth(right, SMOOTHED_STEPS)
            step = first_reached(whole[SMOOTHED_STEPS - 1 :], level)
            found.append(None if step is None else int(tokens[step + SMOOTHED_STEPS - 1]))
        return found

    def stage_seconds(self, task: str, arm: str) -> dict[str, float]:
        """Stage -> its seconds, spread over all steps: the median of the steps that have it, times
        their share. Over all runs of an arm; the stages that it has."""
        found = {}
        for stage in STAGES:
            curves = [r.curve.get(f"seconds_{stage}", []) for r in self.runs(task, arm).values()]
            steps = [value for curve in curves for value in curve]
            values = [value for value in steps if value is not None]
            if values:
                found[stage] = float(np.median(values)) * len(values) / len(steps)
        return found


def verdict(finding: Finding, found: Estimate) -> str:
    """Whether the paper's finding was seen here."""
    if found.seeds < 2:
        return ONE_SEED
    if not finding.paper:
        return {1: "more", -1: "less", 0: UNDECIDED}[found.sign]
    if finding.expected == 0 and found.low > -MARGIN and found.high < MARGIN:
        return SEEN
    if found.sign == 0:
        return UNDECIDED
    return SEEN if found.sign == finding.expected else DIFFERS


def order(verdicts: Sequence[str]) -> list[int]:
    """Places of verdicts, those that contradict the paper first, then those that decide nothing."""
    ranks = (DIFFERS, UNDECIDED, SEEN)
    keys = [ranks.index(v) if v in ranks else len(ranks) for v in verdicts]
    return sorted(range(len(verdicts)), key=keys.__getitem__)


@dataclass(frozen=True, slots=True)
class Judged:
    """A finding with what was measured of it."""

    finding: Finding
    found: Estimate
    seeds: list[float]
    """The difference at each seed."""
    verdict: str


def judge(study: "Study", task: str) -> list[Judged]:
    """The findings that were measured: the paper's, in the order of `order`, then the others."""
    rows = []
    for one in FINDINGS:
        pairs = study.pairs(task, one.arm, one.other, one.metric)
        if pairs is not None:
            found = estimate(pairs)
            rows.append(Judged(one, found, pairs.mean(axis=1).tolist(), verdict(one, found)))
    rows.sort(key=lambda row: not row.finding.paper)
    papers = sum(bool(row.finding.paper) for row in rows)
    return [rows[i] for i in order([row.verdict for row in rows[:papers]])] + rows[papers:]


def sweep_points(study: Study, task: str) -> dict[Trial, Estimate | None]:
    """Run of a sweep -> its accuracy on the validation problems; None: it crashed."""
    return {
        r.trial: None if r.status == "crashed" else estimate(r.scores["validation"].shares[None])
        for r in study.swept
        if r.trial.task == task
    }
