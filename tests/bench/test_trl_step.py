"""Tests the bench of a step of TRL's trainer, at a size that shows nothing but that it works."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.measures import trl_step

pytestmark = pytest.mark.filterwarnings(
    # transformers 5.23 warns of a name that its own trainer reads
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

TINY = {"vocab": 300, "hidden": 16, "layers": 1, "completions": 2, "length": 6, "prompt": 3}
ARGUMENTS = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def kept_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_step, "set_up_cpu", lambda: None)


@pytest.mark.usefixtures("kept_threads")
def test_two_runs_make_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"peak_bytes": 3_000_000, "gradient_bytes": 1_000_000, "weight_bytes": 5}
    calls = []

    def alone(task: Any, name: str, sizes: Any, *, seconds: float) -> dict[str, int]:
        assert seconds == trl_step.MEMORY_SECONDS
        calls.append((task, name, sizes))
        return rows

    monkeypatch.setattr(trl_step, "alone", alone)
    trl_step.main(["--out", str(tmp_path), "--stages", "memory", *ARGUMENTS])
    trl_step.main(["--out", str(tmp_path), "--stages", "time", "--rounds", "1", *ARGUMENTS])
    sizes = trl_step.StepSizes(**TINY)
    assert calls == [(trl_step.measure_memory, name, sizes) for name in trl_step.CONTESTANTS]
    record = json.loads((tmp_path / "trl-step.json").read_text())
    assert record["time"]["statuses"] == {}
    assert max(record["time"]["differences"].values()) < 1e-5
    lines = (tmp_path / "trl-step.md").read_text().splitlines()
    assert "\n".join(lines) in capsys.readouterr().out
    (line,) = [line for line in lines if line.startswith("| KdrlTrainer, no teacher |")]
    assert line.startswith("| KdrlTrainer, no teacher | 3 | 1 | 2 | ")
    assert len([line for line in lines if line.startswith("| ")]) == len(trl_step.CONTESTANTS) + 1
    trl_step.main(["--out", str(tmp_path), "--stages", "memory", *ARGUMENTS, "--layers", "2"])
    assert "time" not in json.loads((tmp_path / "trl-step.json").read_text())


def test_memory_of_a_step_counts_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_step, "map_large_blocks", lambda: None)
    peaks = iter([100, 730])
    monkeypatch.setattr(trl_step, "reset_peak", lambda: next(peaks))
    monkeypatch.setattr(trl_step, "peak_bytes", lambda: next(peaks))
    measured = trl_step.measure_memory(trl_step.TRL, trl_step.StepSizes(**TINY))
    assert measured["peak_bytes"] == 630
    assert measured["gradient_bytes"] == measured["weight_bytes"] > 2 * 300 * 16 * 4


def test_another_gradient_than_trls_is_seen() -> None:
    sizes = trl_step.StepSizes(**TINY)
    with trl_step.trainer_of(trl_step.TRL, sizes) as step:
        trainer, _ = step()

        def wrong() -> Any:
            result = step()
            trainer.model.lm_head.weight.grad.mul_(1.01)
            return result

        steps = {trl_step.TRL: step, trl_step.SAME_AS_TRL[0]: wrong, trl_step.SAME_AS_TRL[1]: step}
        with pytest.raises(ValueError, match=r"patch_trl\(\) must give TRL's gradients"):
            trl_step.differences(steps)


def test_table_compares_rounds() -> None:
    sizes = TINY | {"vocab": 151936}
    machine = {"device": "Test CPU", "threads": 2, "torch": "2", "triton": "3", "python": "3.11"}
    machine |= {"commit": "0" * 9, "uncommitted": ""}
    times = {trl_step.TRL: [100.0, 200.0, 300.0], trl_step.KL: [200.0, 100.0, 300.0]}
    about = {"machine": machine, "command": "c", "ms": times}
    text = trl_step.table({"sizes": sizes, "time": about})
    assert text.startswith("12 completion tokens, V = 151,936, H = 16, 1 layers, float32\n")
    assert (
        "| KdrlTrainer, exact KL |  |  |  | 200 (150-250) | 1.00 (0.75-1.50) |" in text.splitlines()
    )
