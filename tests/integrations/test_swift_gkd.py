"""GKD of ms-swift with the plugin logs what it logs without: loss, norms, parameters."""

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
    "forward-kl": {"beta": "0"},
    "reverse-kl": {"beta": "1", "temperature": "0.7"},
    "jsd": {"beta": "0.5"},
    "jsd-uneven": {"beta": "0.3", "lmbda": "0"},
    "student-samples": {"beta": "0.5", "lmbda": "1"},
    "one-sequence": {"per_device_train_batch_size": "1"},  # ms-swift then drops rows in between
    "all-logits": {"use_logits_to_keep": "false"},
    "and-labels": {"sft_alpha": "0.3", "lmbda": "0", "beta": "1"},
    "no-labels-of-samples": {"sft_alpha": "0.3", "lmbda": "1"},
    "best-tokens": {"gkd_logits_topk": "5", "beta": "0.5", "temperature": "0.7"},
    "another-prompt": {"dataset": "privileged.jsonl", "lmbda": "1"},
    "another-prompt-all-logits": {
        "dataset": "privileged.jsonl",
        "use_logits_to_keep": "false",
    },
    "itself": {"teacher_model": None, "dataset": "privileged.jsonl", "beta": "1"},
    "itself-at-the-start": {**LORA, "teacher_model": "student", "dataset": "privileged.jsonl"},
    "lora-on-the-head": {**LORA, "target_modules": "q_proj|lm_head", "beta": "0"},
    "itself-with-lora": {
        **LORA,
        "target_modules": "q_proj|lm_head",
        "teacher_model": None,
        "dataset": "privileged.jsonl",
    },
    "offloaded": {"offload_teacher_model": "true"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_host_logs_the_same(options: dict[str, str | None], tmp_path: Path) -> None:
    host = train(tmp_path / "host", "gkd", **options)
    ours = train(tmp_path / "ours", "gkd", plugin="yes", **options)
    assert any(norm > 0.01 for norm in host.series("grad_norm"))
    assert all(math.isfinite(norm) for norm in host.series("grad_norm"))
    assert_equal(ours, host)
