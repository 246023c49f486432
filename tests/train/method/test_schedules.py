"""schedules: every kind by hand, and the same values from a log as from the run that wrote it."""

import json
import math
import random
from typing import Any

import pytest

from kdrl_train.method.config import ScheduleConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.method.schedules import (
    History,
    budgeted,
    learning_rate,
    plateau,
    rebuild_history,
    schedule_value,
)

BUDGET = ScheduleConfig(
    kind="kl_budget", initial=0.1, target_kl=0.5, gain=0.1, bounds=(0.08, 0.125)
)
SWITCH = ScheduleConfig(kind="switch", initial=1.0, final=0.25, steps=9, patience=2, min_gain=0.125)


def test_annealed_preset_follows_the_paper() -> None:
    schedule = PRESETS["kdrl_annealed"].kd_coef
    for step in (0, 1, 40, 79, 80, 81, 280):
        paper = max(5e-3 - 5e-5 * step, 1e-3)
        assert schedule_value(schedule, step) == pytest.approx(paper, rel=1e-12)
    assert [round(schedule_value(schedule, s), 12) for s in (0, 80, 280)] == [5e-3, 1e-3, 1e-3]


def test_kinds_that_read_the_step_alone() -> None:
    assert schedule_value(PRESETS["kdrl"].kd_coef, 280) == 2e-3
    cosine = ScheduleConfig(kind="cosine", initial=1.0, final=0.5, steps=4)
    values = [schedule_value(cosine, step) for step in (0, 1, 2, 4, 9)]
    assert values == pytest.approx([1.0, 0.75 + math.sqrt(2) / 8, 0.75, 0.5, 0.5])
    pieces = ScheduleConfig(kind="step", initial=1.0, at=(2, 5), values=(0.5, 0.0))
    assert [schedule_value(pieces, s) for s in range(7)] == [1, 1, 0.5, 0.5, 0.5, 0, 0]
    switch = ScheduleConfig(kind="switch", initial=1.0, final=0.25, steps=3)
    assert [schedule_value(switch, s) for s in range(5)] == [1, 1, 1, 0.25, 0.25]
    assert schedule_value(ScheduleConfig(kind="reward_adaptive", initial=0.5), 9) == 0.5


def test_the_learning_rate_by_hand() -> None:
    assert [learning_rate(1.0, 4, s) for s in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert learning_rate(1.0, 0, 0) == 1.0
    linear = [learning_rate(1.0, 2, s, kind="linear", final=0.2, steps=6) for s in range(8)]
    assert linear == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])
    cosine = [learning_rate(2.0, 0, s, kind="cosine", steps=4) for s in range(5)]
    half = 1 / math.sqrt(2)
    assert cosine == pytest.approx([2, 1 + half, 1, 1 - half, 0])


def test_both_weights_of_opd_then_rl_switch_at_once() -> None:
    method = PRESETS["opd_then_rl"]
    for step, kd, policy in ((0, 1, 0), (139, 1, 0), (140, 0, 1), (279, 0, 1)):
        values = [schedule_value(s, step) for s in (method.kd_coef, method.policy_coef)]
        assert values == [kd, policy]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([], False),
        ([0.5], False),
        ([0.5, 0.625], False),  # one without a gain of more than 1/8
        ([0.5, 0.625, 0.75], False),  # the second is more than 1/8 above the best
        ([0.5, 0.625, 0.625], True),
        ([0.5, 0.25, 0.25], True),
        ([0.5, 0.25, 0.75, 0.5], False),  # a gain starts the count anew
        ([0.5, 0.25, 0.75, 0.5, 0.5], True),
        ([0.5, 0.5, 0.5, 0.9, 1.0], True),  # what comes later does not undo it
    ],
)
def test_plateau_by_hand(scores: list[float], expected: bool) -> None:
    assert plateau(scores, 2, 0.125) is expected
    assert plateau(scores, 0, 0.125) is False
    history = History(scores=scores)
    assert schedule_value(SWITCH, 8, history) == (0.25 if expected else 1.0)
    assert schedule_value(SWITCH, 9, history) == 0.25


def test_kl_budget_by_hand() -> None:
    # KL over target - 1: 1/2, no KL, -1/2, 4 cut at 1 (and at the bound 0.125), -3 cut at -1, -1
    kl = [0.75, None, 0.25, 2.5, -1.0, 0.0, 0.0, 0.0]
    expected = [0.1, 0.105, 0.105, 0.09975, 0.109725, 0.0987525, 0.08887725, 0.08, 0.08]
    values = [budgeted(BUDGET, kl[:step]) for step in range(len(kl) + 1)]
    assert values == pytest.approx(expected, rel=1e-12)
    assert budgeted(BUDGET, [2.5] * 3) == 0.125


@pytest.mark.parametrize("start", [1e-3, 0.9])
def test_kl_budget_brings_the_kl_to_its_target(start: float) -> None:
    """A policy whose KL falls as beta grows, with noise: 0.5 / (1 + 10 beta) is 0.2 at 0.15."""
    draw = random.Random(0)
    budget = ScheduleConfig(kind="kl_budget", initial=start, target_kl=0.2, gain=0.1)
    history = History()
    for step in range(200):
        beta = schedule_value(budget, step, history)
        history.add({"step": step, "kl_teacher": 0.5 / (1 + 10 * beta) + draw.gauss(0, 0.02)})
    assert budgeted(budget, history.kl) == pytest.approx(0.15, rel=0.15)
    assert sum(history.kl[-100:]) / 100 == pytest.approx(0.2, abs=0.01)


def rows(steps: int) -> list[dict[str, Any]]:
    """Rows of a run that evaluates every second step and at its last."""
    draw = random.Random(0)
    values = []
    for step in range(steps):
        row: dict[str, Any] = {"step": step, "kl_teacher": draw.random() / 3}
        if step % 2 == 1 or step == steps - 1:
            row["eval_avg_at_k"] = draw.random() / 7
        values.append(row)
    values[2]["kl_teacher"] = None
    return values


def test_a_log_gives_the_values_of_the_run_that_wrote_it() -> None:
    live, values = History(eval_every=2), []
    written = [json.loads(json.dumps(row)) for row in rows(9)]
    for step, row in enumerate(rows(9)):
        again = rebuild_history({"method.kd_coef": BUDGET}, written, step, 2)
        assert again == live
        values.append(schedule_value(BUDGET, step, live))
        assert schedule_value(BUDGET, step, again) == values[-1]
        live.add(row)
    assert len(set(values)) > 5
    assert live.kl[2] is None
    # the evaluation of the last step is none of every second one
    assert live.scores == [rows(9)[s]["eval_avg_at_k"] for s in (1, 3, 5, 7)]


def test_a_kl_that_is_not_finite_counts_as_unknown_as_it_does_in_the_file() -> None:
    history = History()
    history.add({"step": 0, "kl_teacher": math.inf})
    history.add({"step": 1, "kl_teacher": math.nan})
    assert history.kl == [None, None]


@pytest.mark.parametrize("gone", [[0], [3], [1, 2]])
def test_a_log_with_a_missing_step_is_refused_where_it_is_needed(gone: list[int]) -> None:
    kept = [row for row in rows(6) if row["step"] not in gone]
    for schedule in (BUDGET, SWITCH):
        message = rf'hold steps 0 to 3 to resume method\.kd_coef of kind "{schedule.kind}", got '
        with pytest.raises(ValueError, match=message):
            rebuild_history({"method.kd_coef": schedule}, kept, 4, 2)
    for name in ("kdrl_annealed", "opd_then_rl"):
        rebuild_history(PRESETS[name].schedules, kept, 4, 2)
