"""Tests the intervals of a study on known distributions, pairing, and smoothed curves."""

import numpy as np
import pytest

from bench.study.statistics import first_reached, mean_over_seeds, smooth


def test_estimate_covers_a_known_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        mean = mean_over_seeds(rng.random((1, 200)) < 0.3, draws=400)
        inside += mean.low <= 0.3 <= mean.high
    assert 88 <= inside <= 99


def test_estimate_of_three_seeds_covers_too_although_runs_differ_more_than_problems() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        runs, problems = rng.normal(0.0, 0.02, (3, 1)), 0.2 * rng.normal(size=400)
        mean = mean_over_seeds(runs + problems + 0.2 * rng.normal(size=(3, 400)), draws=400)
        inside += mean.low <= 0.0 <= mean.high
    assert 90 <= inside <= 99


def test_the_interval_of_single_numbers_is_students_t() -> None:
    mean = mean_over_seeds(np.array([[1.0], [2.0], [3.0]]))
    assert mean.high - 2 == pytest.approx(4.303 / np.sqrt(3), rel=1e-3)
    assert (mean.mean, mean.seeds) == (2.0, 3)
    alone = mean_over_seeds(np.array([[2.0]]))
    assert (alone.low, alone.high) == (2.0, 2.0)


def test_estimate_of_seeds_that_differ_is_wider_than_of_one() -> None:
    problems = np.random.default_rng(1).random((1, 500))
    alike = mean_over_seeds(np.repeat(problems, 3, axis=0))
    apart = mean_over_seeds(np.repeat(problems, 3, axis=0) + np.array([[-0.2], [0.0], [0.2]]))
    assert apart.high - apart.low > 3 * (alike.high - alike.low)
    assert apart.mean == pytest.approx(alike.mean)


def test_pairing_takes_out_what_problems_have_in_common() -> None:
    rng = np.random.default_rng(2)
    hard = rng.random(500)
    a, b = hard + 0.02 * rng.random((3, 500)) + 0.05, hard + 0.02 * rng.random((3, 500))
    paired, apart = mean_over_seeds(a - b), mean_over_seeds(a)
    assert paired.sign == 1
    assert paired.high - paired.low < (apart.high - apart.low) / 5
    assert mean_over_seeds(b - a).sign == -1
    assert mean_over_seeds(np.zeros((3, 500))).sign == 0


def test_smooth_and_first_reached() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert first_reached([0.1, 0.3, 0.2], 0.3) == 1
    assert first_reached([0.1], 0.3) is None
