"""The ratio of the policy to the engine that sampled, as vLLM's log-probabilities give it."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("trl")

from tests.integrations.trl_ranks import TrlRun, make_trainer
from tests.integrations.trl_runs import OLD_NAMES, assert_same_runs, logs, small_model

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)


@pytest.mark.parametrize("loss_type", ["dapo", pytest.param("vespo", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "mode",
    [
        "token_truncate",
        "sequence_mask",
        pytest.param("token_mask", marks=pytest.mark.slow),
        pytest.param("sequence_truncate", marks=pytest.mark.slow),
    ],
)
def test_the_ratio_weighs_tokens_as_in_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, loss_type: str
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # of rollout_func
    options = {"vllm_importance_sampling_mode": mode, "loss_type": loss_type}
    options |= {"vllm_importance_sampling_clip_max": 1.5}
    run = TrlRun(folder=tmp_path, options=options, sampler_ratio=True, tool_mask=True)
    ours, theirs = make_trainer(run), make_trainer(replace(run, kdrl=False))
    ours.train()
    theirs.train()
    ratios = [record["sampling/importance_sampling_ratio/mean"] for record in logs(theirs)]
    assert all(abs(ratio - 1) > 0.1 for ratio in ratios)
    assert_same_runs(ours, theirs, dict(small_model(1).named_parameters()))
