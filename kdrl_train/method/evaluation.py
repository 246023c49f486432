"""Computes avg@k, pass@k and maj@k with their intervals from judged completions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from kdrl_train.batch import Rollouts, Verdicts

EVAL_STEP = 2**31
"""Step number of evaluation draws: beyond any training step, so their seeds never coincide."""

BOOTSTRAP_DRAWS = 1000
"""Sets of problems that an interval is made from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """The result of one measurement. Shares are in [0, 1]."""

    problems: int
    samples: int
    """k: completions per problem."""
    avg_at_k: float
    """Mean over problems of the share of right completions."""
    pass_at_k: dict[int, float]
    """k' -> unbiased chance that one of k' completions is right, for k' = 1, 2, 4, ..., k."""
    maj_at_k: float | None
    """Chance that the most frequent answer of a problem's k completions is right. None where right
    completions state no answer that can be read, so that nobody can vote."""
    intervals: dict[str, tuple[float, float]]
    """ "avg@4", "pass@2", "maj@4", ... -> bounds of the 95% interval, see `intervals`."""
    mean_length: float
    """Tokens per completion."""
    truncated: float
    """Share of completions cut at max_new_tokens."""
    outcomes: dict[str, int]
    """Completions by verdict: right, wrong, unparseable, timeout, error."""
    seconds: float
    left_out: int = 0
    """Problems that were not measured, because their prompts are too long."""

    @property
    def shares(self) -> dict[str, float]:
        """Map the name of each share, as in `intervals`, to its value."""
        shares = {f"avg@{self.samples}": self.avg_at_k}
        shares |= {f"pass@{k}": share for k, share in self.pass_at_k.items() if k > 1}
        return shares if self.maj_at_k is None else shares | {f"maj@{self.samples}": self.maj_at_k}

    def metrics(self, prefix: str = "eval_") -> dict[str, float]:
        """Return the keys for metrics.jsonl: each share with its bounds, _low and _high."""
        record = {f"{prefix}length": self.mean_length, f"{prefix}truncated": self.truncated}
        for name, share in self.shares.items():
            kind, _, k = name.partition("@")
            if int(k) == self.samples:
                low, high = self.intervals[name]
                key = f"{prefix}{kind}_at_k"
                record |= {key: share, f"{key}_low": low, f"{key}_high": high}
        return record


def pass_at_k(n: int, right: int, k: int) -> float:
    """Compute the chance that at least one of k completions, drawn without return from n, is right.

    1 - C(n - right, k) / C(n, k): unbiased for pass@k (arXiv 2107.03374).

    Raises: ValueError unless 0 <= right <= n and 1 <= k <= n.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass@k must have right <= n and 1 <= k <= n, got {right=}, {n=}, {k=}")
    return 1 - comb(n - right, k) / comb(n, k)


def majority(right: Sequence[bool], answers: Sequence[str | None]) -> float:
    """Compute the chance that the most frequent answer is right, ties drawn at even odds.

    All right answers are one; others are the same where they are spelled the same
    (rewards.load_answer). A completion without an answer has no vote; 0 where nobody has.

    Args:
        right, answers: k each.
    """
    votes = Counter(
        (good, "" if good else answer)
        for good, answer in zip(right, answers, strict=True)
        if answer is not None
    )
    winners = [key for key, count in votes.items() if count == max(votes.values())]
    return ((True, "") in winners) / max(len(winners), 1)


def intervals(scores: dict[str, np.ndarray], seed: int) -> dict[str, tuple[float, float]]:
    """Compute 95% bootstrap intervals of means over problems.

    They say how far another draw of as many problems of their kind might lie: percentiles of
    BOOTSTRAP_DRAWS sets drawn with return. Each problem keeps its completions, and all scores see
    the same sets.

    Args:
        scores: name -> [P] float, one score per problem.
        seed: the draws are a function of it.
    """
    P = len(next(iter(scores.values())))
    draw = np.random.default_rng([seed, EVAL_STEP])
    sets_DP = draw.integers(P, size=(BOOTSTRAP_DRAWS, P))
    bounds = (np.quantile(s[sets_DP].mean(axis=1), (0.025, 0.975)) for s in scores.values())
    return {name: (float(b[0]), float(b[1])) for name, b in zip(scores, bounds, strict=True)}


def problem_scores(verdicts: Verdicts, samples: int) -> dict[str, np.ndarray]:
    """Score P problems by P * `samples` verdicts: avg@k, pass@1, 2, 4, ..., k, and maj@k.

    maj@k is left out where nobody can vote though some are right. Each score is [P] float64.
    """
    right_PK = np.array([o == "right" for o in verdicts.outcomes]).reshape(-1, samples)
    counts_P = right_PK.sum(axis=1)
    scores = {f"avg@{samples}": counts_P / samples}
    for k in [2**i for i in range(samples.bit_length()) if 2**i < samples] + [samples]:
        scores[f"pass@{k}"] = np.array([pass_at_k(samples, int(c), k) for c in counts_P])
    if counts_P.any() and all(answer is None for answer in verdicts.answers):
        return scores
    answers_PK = np.array(verdicts.answers, dtype=object).reshape(-1, samples)
    votes = [majority(r.tolist(), a.tolist()) for r, a in zip(right_PK, answers_PK, strict=True)]
    return scores | {f"maj@{samples}": np.array(votes)}


def summarize(
    rollouts: Rollouts, verdicts: Verdicts, samples: int, seed: int, seconds: float
) -> EvalResult:
    """Sum up P * `samples` judged completions as one measurement; seed: of the intervals."""
    scores = problem_scores(verdicts, samples)
    means = {name: float(values.mean()) for name, values in scores.items()}
    return EvalResult(
        problems=len(verdicts.outcomes) // samples,
        samples=samples,
        avg_at_k=means[f"avg@{samples}"],
        pass_at_k={int(n[5:]): share for n, share in means.items() if n.startswith("pass@")},
        maj_at_k=means.get(f"maj@{samples}"),
        intervals=intervals(scores, seed),
        mean_length=rollouts.lengths.double().mean().item(),
        truncated=rollouts.truncated.double().mean().item(),
        outcomes=dict(verdicts.counts),
        seconds=seconds,
    )
