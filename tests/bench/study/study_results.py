"""Makes results of a study without any run."""

from typing import Any

from bench.study.arms import ARMS, NOT_TRAINED
from bench.study.config import Trial
from bench.study.trial import Score, TrialResult

TEST = ("test", "longer", "larger")


def result(arm: str, right: str = "0123", *, seed: int = 0, **trial: Any) -> TrialResult:
    """Return the result of a run that ended, with the same digits on every set, and a curve."""
    sampled_trial = Trial(task="arithmetic", arm=arm, seed=seed, **trial)
    sets = ("validation",) if sampled_trial.sweep else TEST
    score = Score(
        samples=4, right=right, pass_at_k=0.5, maj_at_k=None, length=10.0 + seed, truncated=0.0
    )
    curve: dict[str, list[float | None]] = {}
    if arm not in NOT_TRAINED:
        curve = {name: [0.1 * i for i in range(20)] for name in ("accuracy", "seconds_rollout")}
        curve["response_length"] = [20.0] * 20
        curve["tokens"] = [100.0] * 20
    if ARMS[arm].sketched:
        curve |= {"sketch_entries": [2.0 + seed] * 20, "sketch_noise": [0.25, None] * 10}
    return TrialResult(
        trial=sampled_trial,
        status="done",
        scores=dict.fromkeys(sets, score),
        curve=curve,
        seconds=1.0,
    )
