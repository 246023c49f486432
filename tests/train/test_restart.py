"""torchrun starts a run; with --max-restarts it brings one back that lost a rank."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kdrl_train.config import TrainConfig
from kdrl_train.config_file import save_yaml
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.log import read_records
from tests.train.ranks import torchrun
from tests.train.test_two_ranks import alone, assert_same_metrics


@pytest.mark.fault("restart")
@pytest.mark.slow  # torchrun starts two ranks, twice
def test_a_run_that_lost_a_rank_goes_on(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    settings = config(steps=4, save_every=1)
    save_yaml(settings, tmp_path / "run.yaml")
    fail_once = ("-m", "tests.train.fail_once", str(tmp_path / "marker"))
    options = ("--config", str(tmp_path / "run.yaml"), "--resume", "auto")
    printed = torchrun(2, "--max-restarts", "3", *fail_once, "train", *options)
    assert printed.count("step 4/4") == 1  # rank 0 alone speaks
    assert (tmp_path / "marker").exists()
    assert_same_metrics(read_records(settings.out), alone(config("whole", steps=4)))
    kinds = [event["event"] for event in jsonl.read(settings.out / "events.jsonl")]
    assert [kind for kind in kinds if kind in ("started", "resumed", "finished")] == [
        "started",
        "resumed",
        "finished",
    ]
    assert (settings.out / "model").is_dir()
