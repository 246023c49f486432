"""Masks, budgets and a teacher's server of KdrlTrainer, over two processes as over one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")

from tests.integrations.trl_ranks import TrlOutcome, TrlRun, train_ranks
from tests.integrations.trl_runs import small_model, tokenizer
from tests.train.servers import running, teacher_app

pytestmark = pytest.mark.slow  # three to five processes that import TRL
BUDGET = {"kind": "kl_budget", "bounds": [1e-4, 2.0], "gain": 0.3}
CASES: dict[str, dict[str, Any]] = {
    "budget": {"kd": "rkl", "kd_mask": "wrong", "kd_coef_schedule": BUDGET},
    "adaptive": {"kd_coef_schedule": {"kind": "reward_adaptive"}},
}


def assert_same(two: TrlOutcome, one: TrlOutcome) -> None:
    for record, expected in zip(two.log, one.log, strict=True):
        for name in ("loss", "grad_norm", "kdrl/kd_coef", "kdrl/completions", "kdrl/k2"):
            assert record[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    for name, value in one.parameters.items():
        np.testing.assert_allclose(two.parameters[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_a_group_over_two_processes_is_one_group(tmp_path: Path, name: str) -> None:
    options = {"num_generations": 8, "kd_coef": 0.5, "max_steps": 4} | CASES[name]
    run = TrlRun(folder=tmp_path, teacher=True, options=options)
    two, one = train_ranks(run), train_ranks(run, 1)
    assert_same(two, one)
    coefs = [record["kdrl/kd_coef"] for record in two.log]
    assert len(set(coefs)) == (4 if name == "budget" else 1)
    if name == "budget":
        assert all(0 < record["kdrl/completions"] < 1 for record in two.log)


def test_each_process_queries_for_its_completions(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    small_model(2, hidden=48).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    options = {"num_generations": 4, "kd_coef": 0.5, "kd_mask": "wrong"}
    here = train_ranks(TrlRun(folder=tmp_path, teacher=True, options=options))
    with running(teacher_app(folder)) as url:
        run = TrlRun(folder=tmp_path, teacher=url, options=options)
        remote = train_ranks(run)
    for record, expected in zip(remote.log, here.log, strict=True):
        for name in ("loss", "grad_norm", "kdrl/k2"):
            assert record[name] == pytest.approx(expected[name], rel=1e-4), name
