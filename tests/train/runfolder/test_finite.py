"""Weights and moments that are not finite are neither saved nor exported, nor called finished."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from kdrl_train import train
from kdrl_train.config import OptimConfig, TrainConfig
from kdrl_train.errors import BrokenWeightsError
from kdrl_train.ranks import ALONE
from kdrl_train.runfolder import checkpoint, jsonl
from kdrl_train.runfolder.async_saver import Saver
from kdrl_train.runfolder.export import export
from kdrl_train.runfolder.finite import first_broken
from kdrl_train.step import update
from kdrl_train.tools import replay
from tests.train.ranks import train_ranks
from tests.train.runfolder.test_checkpoint import make
from tests.train.runfolder.test_checkpoint import train as train_steps

pytestmark = pytest.mark.fault("weights or gradient not finite")
LAST = "model.model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_first_broken_tensor_is_named(
    dtype: torch.dtype, record_property: Callable[[str, int], None]
) -> None:
    largest = torch.finfo(dtype).max
    whole = [
        ("empty", torch.zeros(0, 3, dtype=dtype)),
        ("integers", torch.tensor([1, 2])),
        ("large", torch.tensor([largest, largest, -largest], dtype=dtype)),  # their sum is not
        ("small", torch.ones(2, 2, dtype=dtype)),
    ]
    assert first_broken(whole) is None
    assert first_broken([]) is None
    record_property("tried", 3)
    for number in (math.nan, math.inf, -math.inf):
        broken = torch.zeros(3, 5, dtype=dtype)
        broken[2, 3] = number
        assert first_broken([*whole, ("broken", broken), ("later", broken)]) == "broken"


@pytest.mark.parametrize("save_async", [False, True])
@pytest.mark.parametrize("key", ["weight", "exp_avg", "exp_avg_sq"])
def test_a_checkpoint_is_refused(
    tiny: Callable[..., Any], tmp_path: Path, key: str, save_async: bool
) -> None:
    policy, optimizer = make(tiny, seed=0)
    train_steps(policy, optimizer, steps=1)
    saver = Saver(TrainConfig(out=tmp_path, save_async=save_async), ALONE, [].append, {})
    saver.save(1, policy, optimizer, None)
    saver.check(wait=True)
    weight = dict(policy.named_parameters())[LAST]
    with torch.no_grad():
        (weight if key == "weight" else optimizer.state[weight][key])[-1, -1] = torch.nan
    name = LAST if key == "weight" else f"{key} of {LAST}"
    with pytest.raises(FloatingPointError, match=rf"got NaN or inf in {name} after 2 steps: they"):
        saver.save(2, policy, optimizer, None)
    saver.close()
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")] == [
        "step_000001"
    ]


@pytest.mark.parametrize(
    ("dtype", "value", "remedy"),
    [
        (None, math.nan, "lower the learning rate"),
        (torch.bfloat16, math.inf, "lower the learning rate"),
        (torch.float16, 65520.0, "in bfloat16: float16 ends at 65504"),  # rounds to inf
    ],
)
def test_an_export_is_refused(
    tiny: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    dtype: torch.dtype | None,
    value: float,
    remedy: str,
) -> None:
    model, folder = tiny("llama", tie_word_embeddings=False), tmp_path / "model"
    dtype_of = None if dtype is None else lambda _: dtype
    with torch.no_grad():
        model.lm_head.weight[3, 2] = 65504.0  # finite in each of them
    export(model, tokenizer, folder, dtype_of=dtype_of)
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.lm_head.weight[3, 2] = value
    message = rf"got NaN or inf in lm_head.weight: {folder} is not written; .*{remedy}$"
    with pytest.raises(FloatingPointError, match=message):
        export(model, tokenizer, folder, dtype_of=dtype_of)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "model.safetensors").read_bytes() == before


def break_last_update(rank: int) -> None:
    """Put NaN into this rank's part of a weight, of rank 1 if there are two, in the second step."""
    take_step = update.take_step

    def broken(optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int) -> float:
        rate = take_step(optimizer, optim, step)
        if step == 1 and rank == 1:
            weight: Tensor = optimizer.param_groups[0]["params"][-1].detach()
            getattr(weight, "to_local", lambda: weight)()[-1] = torch.nan
        return rate

    update.take_step = broken


def assert_not_finished(config: TrainConfig) -> None:
    names = {path.name for path in config.out.iterdir()}
    assert "model" not in names
    assert "failed_step_000001.pt" in names
    assert checkpoint.latest(config.out / "checkpoints").step == 1
    assert jsonl.read(config.out / "events.jsonl")[-1]["event"] == "failed"


def test_a_run_whose_last_update_breaks_its_weights_has_failed(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "take_step", update.take_step)  # is put back
    break_last_update(1)
    settings = config(steps=2, save_every=1)
    with pytest.raises(
        BrokenWeightsError, match=r"in \S+ after 2 steps: .*the batch is in .*001.p"
    ):
        train.main(settings, Console(file=io.StringIO()))
    assert_not_finished(settings)
    dump = settings.out / "failed_step_000001.pt"
    replayed = replay.main(replay.ReplayConfig(file=dump), Console(file=io.StringIO()))
    assert len(replayed) == 16
    assert all(one.finite for one in replayed)  # with the weights before


@pytest.mark.slow  # two ranks
def test_weights_that_one_rank_breaks_stop_all(config: Callable[..., TrainConfig]) -> None:
    settings = config(steps=2, save_every=1)
    for words in train_ranks(settings, 2, sabotage=break_last_update):
        assert "BrokenWeightsError: weights and moments must be finite, got NaN or inf in" in words
    assert_not_finished(settings)
