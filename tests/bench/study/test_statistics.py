"""Intervals of a study on known distributions; pairing; how soon a level is reached."""

import numpy as np
import pytest

from bench.study.statistics import estimate, first_reached, smooth


def test_estimate_covers_a_known_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        found = estimate(rng.random((1, 200)) < 0.3, draws=400)
        inside += found.low <= 0.3 <= found.high
    assert 88 <= inside <= 99


def test_estimate_of_three_seeds_covers_too_although_runs_differ_more_than_problems() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        runs, problems = rng.normal(0.0, 0.02, (3, 1)), 0.2 * rng.normal(size=400)
        found = estimate(runs + problems + 0.2 * rng.normal(size=(3, 400)), draws=400)
        inside += found.low <= 0.0 <= found.high
    assert 90 <= inside <= 99


def test_the_interval_of_single_numbers_is_students_t() -> None:
    found = estimate(np.array([[1.0], [2.0], [3.0]]))
    assert found.high - 2 == pytest.approx(4.303 / np.sqrt(3), rel=1e-3)
    assert (found.mean, found.seeds) == (2.0, 3)
    alone = estimate(np.array([[2.0]]))
    assert (alone.low, alone.high) == (2.0, 2.0)


def test_estimate_of_seeds_that_differ_is_wider_than_of_one() -> None:
    problems = np.random.default_rng(1).random((1, 500))
    alike = estimate(np.repeat(problems, 3, axis=0))
    apart = estimate(np.repeat(problems, 3, axis=0) + np.array([[-0.2], [0.0], [0.2]]))
    assert apart.high - apart.low > 3 * (alike.high - alike.low)
    assert apart.mean == pytest.approx(alike.mean)


def test_pairing_takes_out_what_problems_have_in_common() -> None:
    rng = np.random.default_rng(2)
    hard = rng.random(500)
    a, b = hard + 0.02 * rng.random((3, 500)) + 0.05, hard + 0.02 * rng.random((3, 500))
    paired, apart = estimate(a - b), estimate(a)
    assert paired.sign == 1
    assert paired.high - paired.low < (apart.high - apart.low) / 5
    assert estimate(b - a).sign == -1
    assert estimate(np.zeros((3, 500))).sign == 0


def test_smooth_and_first_reached() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert first_reached([0.1, 0.3, 0.2], 0.3) == 1
    assert first_reached([0.1], 0.3) is None
