"""Analyses the runs of a study: means with intervals, paired differences, the paper's findings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from bench.study.arms import ARMS
from bench.study.config import Trial
from bench.study.statistics import MeanOverSeeds, first_reached, mean_over_seeds, smooth
from bench.study.trial import STAGES, TrialResult

MARGIN = 0.02
"""Two arms count as equal where the whole interval of their difference, a share of right
completions, is smaller than this. An interval that contains 0 shows no equality: a wide one always
contains it."""
SMOOTHED_STEPS = 10
"""An accuracy is reached when the mean over the training samples of so many steps reaches it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim compares two arms, and holds what the paper (arXiv:2506.02208) found."""

    question: str
    arm: str
    other: str
    paper: str
    """The paper's figures; empty where it has none."""
    metric: Literal["accuracy", "length"] = "accuracy"
    expected: Literal[1, 0, -1] = 1
    """Sign of (arm - other) in the paper; 0: no difference beyond MARGIN."""


DIFFERS, UNDECIDED, SEEN = "differs from the paper", "not decided here", "as in the paper"
ONE_SEED = "one seed: not judged"

CLAIMS = (
    Claim("KDRL against GRPO", "kdrl", "grpo", "56.8 against 54.6"),
    Claim("KDRL against distillation", "kdrl", "kd_rkl", "56.8 against 56.1"),
    Claim("distillation against GRPO", "kd_rkl", "grpo", "56.1 against 54.6"),
    Claim("annealed against constant", "kdrl_annealed", "kdrl", "57.2 against 56.8"),
    Claim("annealed against GRPO", "kdrl_annealed", "grpo", "57.2 against 54.6"),
    Claim("k2 against k3", "kdrl", "kdrl_k3", "about 1.4 points more"),
    Claim("joint loss against shaping", "kdrl", "reward_shaping", "steady, where it collapses"),
    Claim("masking: accuracy", "kdrl_masked", "kdrl", "kept", expected=0),
    Claim("masking: length", "kdrl_masked", "kdrl", "1,400 tokens shorter", "length", expected=-1),
    Claim("group mask: accuracy", "kdrl_group_masked", "kdrl", ""),
    Claim("exact KL against k2, in KDRL", "kdrl_exact", "kdrl", ""),
    Claim("exact KL against k2, alone", "kd_rkl_exact", "kd_rkl", ""),
    Claim("centred k2 against k2", "kdrl_centred", "kdrl", ""),
    Claim("distil then RL against joint", "opd_then_rl", "kdrl", ""),
    Claim("SFT against distillation", "sft", "kd_rkl", ""),
    Claim("KDRL against SFT", "kdrl", "sft", ""),
    Claim("linear to 0 against constant", "kdrl_linear", "kdrl", ""),
    Claim("cosine to 0 against constant", "kdrl_cosine", "kdrl", ""),
    Claim("three steps against constant", "kdrl_step", "kdrl", ""),
    Claim("4p(1 - p) against constant", "kdrl_adaptive", "kdrl", ""),
    Claim("k1 as a loss against GRPO", "k1_as_loss", "grpo", ""),
    Claim("bounded k2 against k2", "kdrl_tanh", "kdrl", ""),
    Claim("sign gate against none", "kdrl_sign_gate", "kdrl", ""),
    Claim("top-8 KL against the whole", "kdrl_topk", "kdrl_exact", ""),
    Claim("top-8 KL: no tail against a tail", "kdrl_topk_alone", "kdrl_topk", ""),
    Claim("beyond the teacher, alone", "exopd", "kd_rkl", ""),
    Claim("beyond the teacher, in KDRL", "kdrl_beyond", "kdrl", ""),
    Claim("two teachers against that of products", "two_teachers", "product_teacher", ""),
    Claim("two teachers against that of sums", "two_teachers", "sum_teacher", ""),
    Claim("LoRA against all weights, GRPO", "grpo_lora", "grpo", ""),
    Claim("LoRA against all weights, KDRL", "kdrl_lora", "kdrl", ""),
    Claim("taught by itself against GRPO", "self_live", "grpo", ""),
    Claim("taught by itself against by a teacher", "self_live", "kdrl", ""),
    Claim("taught by its start against by itself", "self_frozen", "self_live", ""),
    Claim("taught by itself: without the reward", "self_alone", "self_live", ""),
    Claim("advantage 1 against the reward's", "constant_advantage", "kdrl", ""),
)


class Study:
    """A study holds its results, sorted by task, arm, teacher and seed.

    Args:
        results: of all runs; those of a sweep and those that crashed are kept apart.
    """

    def __init__(self, results: Iterable[TrialResult]) -> None:
        self.results = list(results)
        self.crashed = [r for r in self.results if r.status == "crashed"]
        self.swept = [r for r in self.results if r.trial.sweep]
        self._final: dict[tuple[str, str, str], dict[int, TrialResult]] = {}
        for result in self.results:
            trial = result.trial
            if not trial.sweep and result.status == "done":
                key = (trial.task, trial.arm, trial.teacher)
                self._final.setdefault(key, {})[trial.seed] = result

    def arms(self, task: str) -> list[str]:
        """List the arms with a reported run, in the order of the runs."""
        return [arm for t, arm, teacher in self._final if t == task and teacher == "middle"]

    def runs(self, task: str, arm: str, teacher: str = "middle") -> dict[int, TrialResult]:
        """Return the runs of an arm that ended and are reported, by seed."""
        return self._final.get((task, arm, teacher), {})

    def accuracy(
        self, task: str, arm: str, name: str = "test", teacher: str = "middle"
    ) -> MeanOverSeeds | None:
        """Compute the mean share of right completions on a set of problems; None without a run."""
        runs = self.runs(task, arm, teacher)
        if not runs:
            return None
        return mean_over_seeds(np.stack([run.scores[name].shares for run in runs.values()]))

    def pairs(self, task: str, arm: str, other: str, metric: str = "accuracy") -> np.ndarray | None:
        """Subtract the results of `other` from those of `arm`, for the seeds that both have.

        Returns: [S, P] differences of the share of right completions of each test problem, or,
            with P = 1, of the length in tokens. None where the arms share no seed.
        """
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
    ) -> MeanOverSeeds | None:
        """Compute the mean of `pairs`, with its interval."""
        pairs = self.pairs(task, arm, other, metric)
        return None if pairs is None else mean_over_seeds(pairs)

    def tokens_to(self, task: str, arm: str, level: float) -> list[int | None]:
        """Count the tokens that each run sampled until its accuracy reached a level.

        The accuracy is that of the training samples, in the mean over SMOOTHED_STEPS steps; None
        where it never reached the level. Runs without a curve are left out. A run draws each prompt
        once, but student and teacher have learnt from all of these problems in their supervised
        training.
        """
        tokens_of_runs: list[int | None] = []
        for run in self.runs(task, arm).values():
            if not run.curve:
                continue
            right = [value or 0.0 for value in run.curve["accuracy"]]
            tokens = np.cumsum([value or 0.0 for value in run.curve["tokens"]])
            whole = smooth(right, SMOOTHED_STEPS)
            step = first_reached(whole[SMOOTHED_STEPS - 1 :], level)
            tokens_of_runs.append(None if step is None else int(tokens[step + SMOOTHED_STEPS - 1]))
        return tokens_of_runs

    def stage_seconds(self, task: str, arm: str) -> dict[str, float]:
        """Compute the seconds that each stage adds to a step, over all runs of an arm.

        They are the median over the steps that have the stage, times the share of such steps.
        Stages that no step has are left out.
        """
        seconds = {}
        for stage in STAGES:
            curves = [r.curve.get(f"seconds_{stage}", []) for r in self.runs(task, arm).values()]
            steps = [value for curve in curves for value in curve]
            values = [value for value in steps if value is not None]
            if values:
                seconds[stage] = float(np.median(values)) * len(values) / len(steps)
        return seconds


def verdict(claim: Claim, difference: MeanOverSeeds) -> str:
    """Say whether the difference measured here agrees with the paper's finding."""
    if difference.seeds < 2:
        return ONE_SEED
    if not claim.paper:
        return {1: "more", -1: "less", 0: UNDECIDED}[difference.sign]
    if claim.expected == 0 and difference.low > -MARGIN and difference.high < MARGIN:
        return SEEN
    if difference.sign == 0:
        return UNDECIDED
    return SEEN if difference.sign == claim.expected else DIFFERS


def order(verdicts: Sequence[str]) -> list[int]:
    """Sort the indices of verdicts: contradictions of the paper first, then undecided ones."""
    ranks = (DIFFERS, UNDECIDED, SEEN)
    keys = [ranks.index(v) if v in ranks else len(ranks) for v in verdicts]
    return sorted(range(len(verdicts)), key=keys.__getitem__)


@dataclass(frozen=True, slots=True)
class Judged:
    """A judged claim holds the difference that was measured, and the verdict."""

    claim: Claim
    difference: MeanOverSeeds
    seeds: list[float]
    """The difference at each seed."""
    verdict: str


@cache
def judge(study: Study, task: str) -> list[Judged]:
    """Judge every claim that was measured: the paper's, in the order of `order`, then others."""
    judged = []
    for claim in CLAIMS:
        pairs = study.pairs(task, claim.arm, claim.other, claim.metric)
        if pairs is not None:
            difference = mean_over_seeds(pairs)
            judged.append(
                Judged(claim, difference, pairs.mean(axis=1).tolist(), verdict(claim, difference))
            )
    papers = [one for one in judged if one.claim.paper]
    sorted_papers = [papers[i] for i in order([one.verdict for one in papers])]
    return sorted_papers + [one for one in judged if not one.claim.paper]


@dataclass(frozen=True, slots=True)
class Twins:
    """Pairs of runs, one with the exact gradient of the head and one with a coarse sketch of it."""

    name: str
    """The arm with the exact gradient, or "all"."""
    test: np.ndarray
    """Accuracy with the sketch less that with the exact gradient, of each test problem: [S, P]."""
    training: np.ndarray
    """The same of all samples that a run trained on: [S, 1]."""
    entries: float
    """Entries kept of a token's dL/dlogits, in the mean over steps and seeds."""
    noise: float
    """Relative error of the gradient of hidden states, in the mean over steps and seeds."""


def twins(study: Study, task: str) -> list[Twins]:
    """Compare each sketched arm with the arm it is like over the seeds of both, then all of them.

    Runs of one seed part ways after a few steps, so pairs of different arms count as independent.
    """
    compared = []
    for name, arm in ARMS.items():
        if arm.like is None or not arm.sketched:
            continue
        test = study.pairs(task, name, arm.like)
        if test is not None:
            ours, theirs = study.runs(task, name), study.runs(task, arm.like)
            training = [
                [_mean([ours[seed]], "accuracy") - _mean([theirs[seed]], "accuracy")]
                for seed in sorted(ours.keys() & theirs.keys())
            ]
            noise = [_mean(ours.values(), f"sketch_{what}") for what in ("entries", "noise")]
            compared.append(Twins(arm.like, test, np.array(training), *noise))
    if len(compared) > 1:
        tests, trainings = ([getattr(one, of) for one in compared] for of in ("test", "training"))
        noise = [
            float(np.mean([getattr(one, of) for one in compared])) for of in ("entries", "noise")
        ]
        compared.append(Twins("all", np.concatenate(tests), np.concatenate(trainings), *noise))
    return compared


def _mean(runs: Iterable[TrialResult], metric: str) -> float:
    """Return the mean of a metric over runs and those steps that have it."""
    values = [value for run in runs for value in run.curve[metric] if value is not None]
    return float(np.mean(values))


@cache
def sweep_points(study: Study, task: str) -> dict[Trial, MeanOverSeeds | None]:
    """Return the validation accuracy of each run of a sweep; None where it crashed."""
    return {
        r.trial: None
        if r.status == "crashed"
        else mean_over_seeds(r.scores["validation"].shares[None])
        for r in study.swept
        if r.trial.task == task
    }
