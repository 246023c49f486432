"""With save_async a checkpoint is written while training goes on."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl_train.config import TrainConfig
from kdrl_train.model.policy import HeadedModel
from kdrl_train.ranks import ALONE
from kdrl_train.runfolder import checkpoint
from kdrl_train.runfolder.async_saver import Saver
from kdrl_train.runfolder.log import read_records
from tests.train.full_disk import full_disk
from tests.train.runfolder.test_checkpoint import make, states, train
from tests.train.test_train import run, without_times
from tests.train.test_two_ranks import alone, assert_same_metrics, together

Config = Callable[..., TrainConfig]


def test_it_holds_the_state_of_its_step(tiny: Callable[..., Any], tmp_path: Path) -> None:
    policy, optimizer = make(tiny, seed=0)
    train(policy, optimizer, steps=2)
    expected, said = states(policy, optimizer), []
    teacher = HeadedModel(tiny("qwen2", seed=5))
    taught = [weight.clone() for weight in teacher.parameters()]
    config = TrainConfig(out=tmp_path, save_async=True)
    saver = Saver(config, ALONE, said.append, {"data": {"count": 3, "sha256": "ab"}})
    saver.save(2, policy, optimizer, {"of": "the next step"}, teacher=teacher)
    with torch.no_grad():  # at once: it is being written
        for tensor in [*policy.parameters(), *states(policy, optimizer), *teacher.parameters()]:
            tensor.mul_(3)
    saver.check(wait=True)
    saver.check(wait=True)
    folder = tmp_path / "checkpoints"
    assert said == [f"saved {folder / 'step_000002'}"]
    assert torch.load(folder / "step_000002" / "rollouts.pt") == {"of": "the next step"}
    other, other_optimizer = make(tiny, seed=9)
    newest = checkpoint.latest(folder)
    assert newest.data == {"data": {"count": 3, "sha256": "ab"}}
    done = checkpoint.load(newest, model=other, optimizer=other_optimizer, teacher=teacher)
    assert done == 2
    assert all(map(torch.equal, teacher.parameters(), taught))
    for ours, theirs in zip(states(other, other_optimizer), expected, strict=True):
        assert torch.equal(ours, theirs)
    saver.close()


def test_the_next_step_does_not_wait(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(steps=2, save_every=1, save_async=True)
    publish, counts = checkpoint.publish, []

    def late(*arguments: Any) -> None:
        until = time.monotonic() + 30
        while len(read_records(settings.out)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        counts.append(len(read_records(settings.out)))
        publish(*arguments)

    monkeypatch.setattr(checkpoint, "publish", late)
    run(settings)
    assert counts == [2, 2]
    assert (settings.out / "checkpoints" / "LATEST").read_text() == "step_000002\n"


@pytest.mark.slow
def test_ranks_write_together(config: Config) -> None:
    whole, parts = config("whole"), config("parts", steps=2, save_every=1, save_async=True)
    expected = alone(whole)
    together(parts, 2)
    assert_same_metrics(alone(replace(parts, steps=3, resume=True, save_async=False)), expected)


@pytest.mark.slow
@pytest.mark.fault("full disk")
def test_a_full_disk_stops_the_run_after_the_step(config: Config) -> None:
    settings = config(steps=1, save_async=True)
    run(settings)
    more = replace(settings, steps=9, save_every=2, resume=True)
    message = r"the checkpoint of step 2 must be written to .*: free"
    with full_disk(20_000), pytest.raises(OSError, match=message):
        run(more)
    names = {path.name for path in (settings.out / "checkpoints").iterdir()}
    assert names == {"LATEST", "step_000001"}
    assert len(read_records(settings.out)) < 5  # the one after the next save at the latest
    records = run(replace(more, steps=3))
    assert without_times(records) == without_times(run(config("whole", steps=3)))
