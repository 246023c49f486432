"""Tests which kernels the search for tiles compiles."""

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import tiles
from bench.instructions import RESULTS
from kdrl_kernels.rows.tiles import TILES, Tile
from tests.kernels import aot


def test_the_kernels_of_the_table_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def compile_one(variant: aot.Variant, *_: Any, **__: Any) -> None:
        names.append(variant[0])

    monkeypatch.setattr(aot, "compile_one", compile_one)
    monkeypatch.setattr(aot, "resources", lambda _: {"registers": 40})
    monkeypatch.setattr(aot, "instructions", lambda _, streams: 10.0 / streams)
    rows = list(tiles.compiled(Tile(1, 512, 4)))
    assert {key for key, _ in rows} == TILES.keys()
    assert {one["registers"] for _, one in rows} == {40}
    streams = {name: 10 / one["instructions"] for name, (_, one) in zip(names, rows, strict=True)}
    assert streams["sweep-None"] == 1
    assert streams["sweep-jsd"] == streams["sketch-fkl"] == 2
    assert streams["sketch-rkl"] == 1, "it reads the teacher only where there are entries"


KEPT = {("jsd", 2, False): Tile(2, 512, 4), ("gradient", 2, True): Tile(4, 512, 4)}
"""What the table takes where the code has another tile, for the reason that rows/tiles.py names."""


def test_the_code_has_the_tiles_that_the_committed_table_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiles, "DEVICE", "cpu")
    rows = json.loads((RESULTS / "tiles.json").read_text("utf-8"))["rows"]
    taken = {key: Tile(*tiles.best(group)["tile"]) for key, group in tiles._by_key(rows).items()}
    assert taken == TILES | KEPT
    assert all(TILES[key] != tile for key, tile in KEPT.items())
    lines = (RESULTS / "tiles.md").read_text("utf-8").splitlines()
    assert lines[2:] == tiles.markdown(rows).splitlines()


def test_a_kernel_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = [("_sweep_kernel", 10.0 + i % 2) for i in range(tiles.ROUNDS)] + [("other", 500.0)]
    events = [SimpleNamespace(name=name, device_time_total=us) for name, us in launches]
    profile = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: nullcontext(profile))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert tiles._kernel_ms(lambda: None, "_sweep_kernel") == 10.5e-3
    with pytest.raises(RuntimeError, match="must see 20 launches of _jsd_kernel, got 0"):
        tiles._kernel_ms(lambda: None, "_jsd_kernel")
