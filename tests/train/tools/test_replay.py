"""replay: it names the completion that made a step fail."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from kdrl_train.cli import main
from kdrl_train.config import TrainConfig
from kdrl_train.method import grpo
from kdrl_train.model.policy import Policy
from kdrl_train.tools import replay
from tests.train.coefficients import coefficients_of
from tests.train.conftest import EXACT
from tests.train.test_train import run

Config = Callable[..., TrainConfig]


@pytest.fixture
def failed(config: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the dump of a step whose fourth completion has an infinite advantage."""
    advantages, calls = grpo.advantages, []

    def broken(*arguments: Any) -> Tensor:
        values_R = advantages(*arguments)
        calls.append(1)
        if len(calls) == 3:
            values_R[3] = math.inf
        return values_R

    monkeypatch.setattr(grpo, "advantages", broken)
    settings = config(steps=4)
    with pytest.raises(FloatingPointError, match=r"replay --file` takes apart"):
        run(settings)
    return settings.out / "failed_step_000002.pt"


def test_the_culprit_is_named(failed: Path) -> None:
    out = io.StringIO()
    replayed = replay.main(replay.ReplayConfig(file=failed), Console(file=out, width=200))
    assert [one.index for one in replayed if not one.finite] == [3]
    assert sorted(one.index for one in replayed) == list(range(16))
    words = out.getvalue()
    assert "step 2: 1 of 16 not finite" in words
    assert sum("task.jsonl:" in line for line in words.splitlines()) == 11
    for one in replayed:
        assert one.outcome == ("right" if one.reward > 0.5 else "wrong")
    assert {"right", "wrong"} <= set(words.split())
    out = io.StringIO()
    replay.main(replay.ReplayConfig(file=failed, all=True), Console(file=out, width=80))
    assert "…" not in out.getvalue()  # into a file numbers are whole, whatever its width
    assert all(f"{one.lowest_logprob:.3g}" in out.getvalue() for one in replayed)
    assert sum("task.jsonl:" in line for line in out.getvalue().splitlines()) == 16


def test_numbers_are_those_of_the_step(
    failed: Path, monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    """Compares the sum of losses, without the infinite advantage, with that of an unbroken run."""
    monkeypatch.undo()
    dump = torch.load(failed)
    coefficients = coefficients_of(dump["rewards"], EXACT, 2)
    dump["coefficients"]["advantages"] = coefficients.advantages
    torch.save(dump, failed)
    seeds: list[tuple[int, float]] = []
    monkeypatch.setattr(Policy, "draw_sketch", lambda _, seed, scale: seeds.append((seed, scale)))
    replayed = replay.main(replay.ReplayConfig(file=failed), Console(file=io.StringIO()))
    assert all(one.finite for one in replayed)
    records = run(config("whole", steps=3))
    assert seeds[0] == seeds[3]  # the sketch of the head that the step had
    assert len(set(seeds[1:])) == 3
    assert sum(one.loss for one in replayed) == pytest.approx(records[2]["loss"], rel=1e-4)
    for one in replayed:
        assert one.tokens == len(dump["completion_ids"][one.index])
        assert one.lowest_logprob == pytest.approx(dump["logprobs"][one.index].min().item(), 1e-4)


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.pt").write_bytes(b"nothing")
    for name in ("other.pt", "missing.pt"):
        assert main(["replay", "--file", str(tmp_path / name)]) == 1
        assert "file must be a failed_step_XXXXXX.pt" in capsys.readouterr().err


def test_values_of_another_kind_are_refused(tmp_path: Path) -> None:
    path, ones = tmp_path / "failed_step_000000.pt", torch.ones(1)
    coefficients = {"advantages": ones, "token_weights": ones, "kd_weight": ones}
    dump = {"step": 0, "part": 0, "rewards": ones, "coefficients": coefficients}
    dump |= {"example_ids": ["a"], "prompt_ids": [ones], "completion_ids": [ones]}
    dump |= {"logprobs": [ones], "truncated": ones, "texts": ["b"]}
    torch.save(dump, path)
    assert replay.load_dump(path)["coefficients"].advantages == ones
    for name in dump:
        for value in ("x", [1, 2], None, {"a": 1}, 1.5):
            torch.save(dump | {name: value}, path)
            with pytest.raises(
                ValueError, match=r"^file must be a failed_step_XXXXXX\.pt of a run"
            ):
                replay.load_dump(path)


def test_a_missing_checkpoint_is_named(failed: Path) -> None:
    place = failed.parent / "checkpoints" / "step_000002"
    for file in place.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"step_000002 must be a checkpoint folder"):
        replay.main(replay.ReplayConfig(file=failed), Console(file=io.StringIO()))
