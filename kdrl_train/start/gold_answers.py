"""Checks before the first step that the rewards accept the gold answers of all problems."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from kdrl_train.batch import OUTCOMES, Example, Verdicts
from kdrl_train.config import EvaluateConfig, RewardConfig, TrainConfig
from kdrl_train.rollouts.reward_inputs import answer_inputs, check_columns
from kdrl_train.rollouts.verifier import Verifier

GOLDS_AT_ONCE = 1000
"""Gold answers that are sent to the verifier together."""
OWN_REWARD_S = 60.0
"""Seconds for judging gold answers by a reward function of the user's own, which may be slow."""


def check_gold(
    config: TrainConfig | EvaluateConfig,
    examples: Sequence[Example],
    verifier: Verifier,
    tokenizer: Any = None,
) -> str:
    """Check that each gold answer, in a box, earns a reward when it is judged against itself.

    Equal ones are judged once, unless a reward sees more of a problem. A reward function of the
    user's own may expect another format: it must only run without error, on those that it judges
    within OWN_REWARD_S.

    tokenizer: needed where a reward takes tokens.
    Raises: ValueError naming the first gold answer that fails, and the error if there was one;
        UserWarning where reward.right_above is less than half of the largest reward, or not below
        it, or below 0 for math and exact, and where a reward does not get a column.
    """
    reward = config.reward
    left_out = check_columns(examples) if "columns" in verifier.inputs else []
    alone = not {"prompt", "columns"} & verifier.inputs
    keys = [example.gold if alone else place for place, example in enumerate(examples)]
    distinct = dict(zip(reversed(keys), reversed(examples), strict=True))  # the first of equals
    order = list(dict.fromkeys(keys))
    longest_s = math.inf if reward.builtin else OWN_REWARD_S
    verdicts = _judge([distinct[key] for key in order], verifier, tokenizer, longest_s)
    outcomes = dict(zip(order, verdicts.outcomes, strict=False))
    judged = [(key, e) for key, e in zip(keys, examples, strict=True) if key in outcomes]
    counts = Counter(outcomes[key] for key, _ in judged)
    summary = ", ".join(f"{counts[name]:,} {name}" for name in OUTCOMES if counts[name])
    summary += f" of {len(examples):,}" if len(judged) < len(examples) else ""
    accepted = _accepted(reward)
    failed = [(key, example) for key, example in judged if outcomes[key] not in accepted]
    if failed:
        key, example = failed[0]
        others = ", ".join(other.id for _, other in failed[1:6])
        message = verdicts.errors.get(order.index(key), "")
        must, remedy = _gold_rule(reward, outcomes[key])
        raise ValueError(
            f"{must}, got {summary}; first: {example.id}, "
            f"answer {example.gold[:80]!r}, {outcomes[key]} {message}".rstrip()
            + f": {remedy}"
            + (f"; also {others}" if others else "")
        )
    if counts["timeout"]:
        raise UserWarning(
            f"gold answers in a box must be judged within reward.timeout_s, got {summary}: such a "
            "completion is paid 0; make reward.function faster, or raise reward.timeout_s"
        )
    summary += _threshold(reward, verdicts)
    if left_out:
        raise UserWarning(
            f"rewards do not get the columns {', '.join(left_out)}, which hold something else than "
            f"text, numbers, lists and dicts; {summary}"
        )
    return summary


def _judge(
    examples: Sequence[Example], verifier: Verifier, tokenizer: Any, longest_s: float
) -> Verdicts:
    """Judge gold answers in a box, GOLDS_AT_ONCE at a time, until longest_s have passed."""
    parts: list[Verdicts] = []
    start = time.monotonic()
    for first in range(0, len(examples), GOLDS_AT_ONCE):
        if parts and time.monotonic() > start + longest_s:
            break
        part = examples[first : first + GOLDS_AT_ONCE]
        texts = [f"\\boxed{{{example.gold}}}" for example in part]
        more = answer_inputs(verifier.inputs, part, texts, tokenizer)
        parts.append(verifier.score(texts, [example.gold for example in part], more=more))
    return Verdicts.join(parts)


def _accepted(reward: RewardConfig) -> set[str]:
    """Name the outcomes that a gold answer may have: own functions may expect other formats, and
    may be slow."""
    if reward.builtin:
        return {"right"}
    if reward.deciding.function in ("math", "exact"):
        return {"right", "timeout"}
    return {outcome for outcome in OUTCOMES if outcome != "error"}


def _gold_rule(reward: RewardConfig, outcome: str) -> tuple[str, str]:
    """Say what gold answers must be, and what to do about one with this outcome."""
    if reward.builtin or outcome != "error":
        remedy = "correct the row, or set data.answer_column or reward.function"
        return "gold answers must be right against themselves", remedy
    names = "reward.functions" if reward.functions else reward.function
    return (
        f"{names} must judge gold answers in a box without an error",
        "correct the function, or the row",
    )


def _threshold(config: RewardConfig, verdicts: Verdicts) -> str:
    """Say which rewards are right.

    Raises: UserWarning where reward.right_above is less than half of the largest reward, or no
        reward is above it, or below 0 for math and exact.
    """
    name = config.deciding.label
    what = f"a value of {name}" if config.functions else "a reward"
    rule = f"{what} above {config.right_above:g} (reward.right_above)"
    if config.deciding.function in ("math", "exact"):
        if config.right_above < 0:
            raise UserWarning(
                f"reward.right_above must be at least 0 for {name}, got {config.right_above:g}: "
                "it pays 0 for a wrong answer, so each answer that it reads would be right"
            )
        return f"; right: {rule}"
    values = verdicts.parts.get(name, verdicts.rewards)
    low, high = min(values), max(values)
    rule = f"; right: as the function says, else {rule}; rewards from {low:g} to {high:g}"
    if 2 * config.right_above < high and high > 1:
        raise UserWarning(
            f"gold answers in a box{rule}: set reward.right_above to half of the largest reward, "
            f"e.g. {high / 2:g}, unless a smaller one is right too, or the function says what is "
            "right"
        )
    if 0 < high <= config.right_above and "right" not in verdicts.outcomes:
        raise UserWarning(
            f"no gold answer in a box is right{rule}: set reward.right_above to half of the "
            "largest reward that the function can give, unless it expects another format than a box"
        )
    return rule
