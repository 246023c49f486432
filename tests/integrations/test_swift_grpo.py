"""GRPO of ms-swift with the plugin logs what it logs without: loss, norms, KL, parameters."""

import math
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the host and what it imports, at their import
    pytest.importorskip("swift.rlhf_trainers.grpo_trainer")

from tests.integrations.swift_runs import assert_equal, train

pytestmark = [pytest.mark.swift, pytest.mark.filterwarnings("ignore")]  # the host's own warnings

LORA = {"tuner_type": "lora", "lora_rank": "4", "lora_dropout": "0"}
CASES: dict[str, dict[str, str | None]] = {
    "grpo": {},
    "dapo-several-updates": {"loss_type": "dapo", "num_iterations": "2", "learning_rate": "0.2"},
    "bnpo-no-reference": {"loss_type": "bnpo", "beta": "0", "temperature": "0.7"},
    "dr_grpo-two-sided": {"loss_type": "dr_grpo", "delta": "1.5", "epsilon_high": "0.28"},
    "cispo": {"loss_type": "cispo", "epsilon_high": "5", "beta": "0"},
    "sapo": {"loss_type": "sapo"},
    "rloo": {"advantage_estimator": "rloo", "kl_in_reward": "true"},
    "sequence": {"importance_sampling_level": "sequence", "num_iterations": "2"},
    "entropies": {"log_entropy": "true", "top_entropy_quantile": "0.5"},
    "overlong": {"overlong_filter": "true", "gradient_accumulation_steps": "1"},
    "lora": {**LORA, "target_modules": "all-linear"},
    "lora-on-the-head": {**LORA, "target_modules": "q_proj|lm_head"},
    "lora-saves-the-head": {**LORA, "target_modules": "q_proj", "modules_to_save": "lm_head"},
    "teacher": {"teacher_model": "teacher", "teacher_kl_coef": "0.5", "beta": "0"},
    "teacher-alone": {"teacher_model": "teacher", "reward_funcs": None, "num_iterations": "2"},
    "teacher-is-the-start": {**LORA, "target_modules": "all-linear", "teacher_model": "student"},
    "another-prompt": {"dataset": "privileged.jsonl", "teacher_model": "teacher"},
    "rlsd": {"dataset": "privileged.jsonl", "advantage_reweight": "rlsd", "beta": "0"},
    "sdar": {"dataset": "privileged.jsonl", "sdar_loss_coef": "0.3"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_host_logs_the_same(options: dict[str, str | None], tmp_path: Path) -> None:
    host = train(tmp_path / "host", "grpo", **options)
    ours = train(tmp_path / "ours", "grpo", plugin="yes", **options)
    assert all(norm > 0.01 and math.isfinite(norm) for norm in host.series("grad_norm"))
    assert_equal(ours, host)
