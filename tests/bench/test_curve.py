"""Tests the table of a training run, and that a stopped run leaves one."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from bench import curve


def _record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "reward": step / 100,
        "accuracy": 0.5,
        "kl_teacher": None,
        "tokens_per_s": 1000.0 * (step + 1),
        "seconds": 1.0 + step,
        "seconds_rollout": 0.25,
        "peak_memory_bytes": 2e9 + step,
        **more,
    }


def test_table_of_a_run() -> None:
    records = [_record(step) for step in range(20)]
    text = curve.document(records, {"teacher": 12.3, "student": 4.0})
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == "| steps | reward | accuracy | kl_teacher | tokens/s |"
    assert rows[1] == "| 0 to 2 | 0.010 | 50.0% |  | 2,000 |"
    assert rows[-1] == "| 18 to 19 | 0.185 | 50.0% |  | 19,500 |"
    assert len(rows) == 1 + math.ceil(20 / 3)
    assert "Median of a step: 11,000 tokens/s, 11.00 s;\nrollout 0.25 s. Peak" in text
    assert "Peak memory 2.00 GB. teacher 12 s, student 4 s\n" in text


def test_without_a_step_it_says_so() -> None:
    assert curve.document([], {"teacher": 3.0}).endswith("\n\nNo step is done. teacher 3 s\n")


def test_a_torn_line_is_no_record(tmp_path: Path) -> None:
    assert curve.read(tmp_path) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "rew')
    assert curve.read(tmp_path) == [{"step": 0}]


def test_the_table_is_kept_up_while_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "EVERY_S", 0.01)
    (tmp_path / "run").mkdir()
    path, deadline = tmp_path / "curve.md", time.monotonic() + 20

    def add(step: int) -> None:
        with (tmp_path / "run/metrics.jsonl").open("a") as file:
            file.write(json.dumps(_record(step)) + "\n")

    def stopped_run() -> None:
        with curve.kept_up(tmp_path, {}):
            add(0)
            while not path.exists() or "| 0 to 0 |" not in path.read_text():
                assert time.monotonic() < deadline
            add(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_run()
    assert "| 1 to 1 |" in path.read_text()


def test_the_run_is_the_demos_on_this_machine(tmp_path: Path) -> None:
    run = curve.run_config(curve.GPU, tmp_path)
    assert (run.model.device, run.optim.micro_batch_tokens) == ("auto", 16384)
    assert (run.sampling.prompts_per_step, run.sampling.group_size) == (64, 16)
    assert run.method.kd == "rkl"
    assert run.method.policy != "off"


@pytest.mark.slow  # trains three models
def test_a_tiny_run(tmp_path: Path) -> None:
    curve.main(["--out", str(tmp_path / "out"), "--tiny"])
    assert [one["step"] for one in curve.read(tmp_path / "out")] == [0, 1, 2]
    assert "| 2 to 2 |" in (tmp_path / "out/curve.md").read_text()
