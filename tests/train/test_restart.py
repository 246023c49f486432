"""torchrun --max-restarts brings a run back that lost a rank."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kdrl_train.config import TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.log import read_records
from tests.train.test_two_ranks import alone, assert_same_metrics


@pytest.mark.fault("restart")
@pytest.mark.slow  # torchrun starts two ranks, twice
def test_a_run_that_lost_a_rank_goes_on(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    settings = config(steps=4, save_every=1)
    save_yaml(settings, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "3", "-m", "tests.train.fail_once"]
    command += [
        str(tmp_path / "marker"),
        "train",
        "--config",
        str(tmp_path / "run.yaml"),
        "--resume",
        "auto",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "marker").exists()
    assert_same_metrics(read_records(settings.out), alone(config("whole", steps=4)))
    kinds = [event["event"] for event in jsonl.read(settings.out / "events.jsonl")]
    assert [kind for kind in kinds if kind in ("started", "resumed", "finished")] == [
        "started",
        "resumed",
        "finished",
    ]
    assert (settings.out / "model").is_dir()
